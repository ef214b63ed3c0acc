"""``python -m spikingbrain_train.pipelines.demo.fit``: how long the demo's stages are on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.errors import DataError
from spikingbrain_train.pipelines.demo.budget import check_minutes, fit, read_speed
from spikingbrain_train.pipelines.demo.named_settings import NamedSettings
from spikingbrain_train.pipelines.demo.stages import STAGES, FittedStages, fitted_stages
from spikingbrain_train.pipelines.state import State
from spikingbrain_train.storage.durable_files import write_text_durably

_DESCRIPTION = """\
Fit the two stages of the demo to the speed that spikingbrain-measure-speed measured, and write the settings
of both as JSON.
"""


def fit_command_line(arguments: Sequence[str] | None = None) -> None:
    """``python -m spikingbrain_train.pipelines.demo.fit``."""
    parser = argparse.ArgumentParser(prog="fit", description=_DESCRIPTION)
    parser.add_argument(
        "--pipeline-output", type=Path, required=True, metavar="DIR", help="folder of the demo"
    )
    parser.add_argument(
        "--speed", type=Path, required=True, metavar="FILE", help="what spikingbrain-measure-speed wrote"
    )
    parser.add_argument(
        "--held-out", type=Path, required=True, metavar="PREFIX", help="dataset of the held-out text"
    )
    parser.add_argument("--budget", type=float, required=True, metavar="MINUTES", help="for the whole demo")
    parser.add_argument(
        "--spent", nargs="*", default=[], metavar="STEP", help="steps whose time the budget has paid for"
    )
    for stage in STAGES:
        parser.add_argument(
            f"--{stage}",
            nargs="*",
            default=[],
            metavar="NAME=VALUE",
            help=f"the user's settings of the {stage} stage",
        )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parsed = parser.parse_args(arguments)
    with user_errors():
        check_minutes(parsed.budget)
        records = State(parsed.pipeline_output).records
        fitted = fit_stages(
            parsed.speed,
            parsed.held_out,
            parsed.budget,
            sum(records[name].seconds for name in parsed.spent if name in records),
            NamedSettings(parsed.align, parsed.cpt),
        )
        write_text_durably(parsed.output, json.dumps(asdict(fitted), indent=2) + "\n")
        print(fitted.sentence)


def fit_stages(
    speed: Path, held_out: Path, minutes: float, spent: float, named: NamedSettings
) -> FittedStages:
    """How long the stages are on this machine.

    Args:
        speed: what spikingbrain-measure-speed wrote.
        held_out: prefix of the held-out text.
        minutes: what the demo may take.
        spent: seconds that it has taken so far.
        named: the user's own settings.

    Raises:
        ConfigurationError: what was measured cannot be read, or the settings do not fit each other.
        DataError: the text's description cannot be read.
    """
    align, cpt = (compose_run([f"experiment=smollm2_{stage}", *getattr(named, stage)]) for stage in STAGES)
    tokens = _read_tokens(Path(f"{held_out}.json"))
    return fitted_stages(fit(read_speed(speed), align, cpt, minutes, spent, tokens, named), named)


def _read_tokens(sidecar: Path) -> int:
    try:
        return int(json.loads(sidecar.read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{sidecar} cannot be read; run the demo with --fresh") from None


if __name__ == "__main__":
    fit_command_line()
