"""Flags of spikingbrain-evaluate for long-context probes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.measurement import Measurement, Part
from spikingbrain_train.evaluation.probes.plan import SAMPLES, SEED, ProbePlan, Scoring
from spikingbrain_train.evaluation.probes.registry import PROBES

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.language_model import LanguageModel

_DEFAULT_LENGTHS = "1k,4k"


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """Add them, in a group of their own."""
    group = parser.add_argument_group(
        "long-context probes", "hide something in a text and ask for it at its end; they need no data set"
    )
    group.add_argument(
        "--probes",
        metavar="A,B",
        help=f"of {', '.join(PROBES)}, or all (docs/evaluation.md says what each is)",
    )
    group.add_argument(
        "--probe-lengths",
        metavar="N,N",
        help=f"tokens of a text with its answer, 1k,4k,128k (a k is 1024; default: {_DEFAULT_LENGTHS})",
    )
    group.add_argument(
        "--probe-depths", metavar="P,P", help="where to hide it, in percent (default: 0,25,50,75,100)"
    )
    group.add_argument(
        "--probe-samples",
        type=int,
        metavar="N",
        help=f"texts of each probe, length and depth (default: {SAMPLES})",
    )
    group.add_argument(
        "--probe-scoring",
        choices=[each.value for each in Scoring],
        help="likelihood: greedy decoding gives each token of the answer, found out in one forward pass; "
        "generation: the text written behind the prompt contains it, as RULER counts (default: likelihood)",
    )
    group.add_argument(
        "--probe-text",
        type=Path,
        metavar="FILE",
        help="text in which needle_text, needle_uuid and multikey hide theirs (default: Python's own "
        "documentation topics)",
    )
    group.add_argument("--probe-seed", type=int, metavar="N", help=f"of all texts (default: {SEED})")


def probes_of(arguments: argparse.Namespace) -> ProbeMeasurement | None:
    """What the flags ask for, None without ``--probes``.

    Raises:
        ConfigurationError: a value that does not fit, or a flag that nothing reads.
    """
    given = {
        name: value
        for name in ("lengths", "depths", "samples", "scoring", "text", "seed")
        if (value := getattr(arguments, f"probe_{name}")) is not None
    }
    if arguments.probes is not None:
        return ProbeMeasurement(ProbePlan.of(arguments.probes, **{"lengths": _DEFAULT_LENGTHS, **given}))
    for name in given:
        raise ConfigurationError(f"--probe-{name} is read with --probes only; name probes, or leave it out")
    return None


class ProbeMeasurement(Measurement):
    """The part ``probes`` of a report."""

    def __init__(self, plan: ProbePlan) -> None:
        self.plan = plan

    def measure(self, model: LanguageModel) -> Part:
        from spikingbrain_train.evaluation.probes.measure import measure_probes

        results = measure_probes(model, self.plan)
        return Part("probes", results.as_json(), results.describe())
