"""Arguments of ``spikingbrain-plot``, understood before matplotlib is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.dense_line import DenseLine
from spikingbrain_train.reporting.plots.evaluation_picture import draw_reports
from spikingbrain_train.reporting.plots.evaluation_report import Report
from spikingbrain_train.reporting.plots.formats import format_of
from spikingbrain_train.reporting.plots.panels import PANELS
from spikingbrain_train.reporting.plots.plot import plot_runs
from spikingbrain_train.reporting.plots.recording import Axis
from spikingbrain_train.reporting.plots.views import Options

_DESCRIPTION = """\
Draw what runs have written into their metrics.jsonl: one run, the stages of one model end to end, or runs
beside each other. Or draw what spikingbrain-evaluate has written (files, not folders): scores of multiple
choice with their errors, what probes found by length and depth, and how a student and its teacher part.

Runs of which each starts from a checkpoint of another are laid end to end, in that order whatever the order
of the arguments; all others are refused unless --compare draws them on one axis from 0. Thin dashed lines are
where a run went on after a stop, with the settings that were changed.
"""

_EXAMPLES = """\
panels (those of which there is something are drawn; throughput and optimizer only when asked for):
{panels}

examples:
  # one run: its loss, and what else there is to see of it
  spikingbrain-plot outputs/smollm2/cpt

  # the stages of one model, with the line to reach
  spikingbrain-plot outputs/smollm2/align outputs/smollm2/cpt --dense-cross-entropy outputs/smollm2/dense.json

  # three rates on one axis, over hours
  spikingbrain-plot --compare outputs/lr_1e-4 outputs/lr_3e-4 outputs/lr_1e-3 --x hours --output rates.svg

  # multiple choice, probes and generation of two models beside each other
  spikingbrain-plot cpt.json distill.json --output evaluations.png

  # chosen panels, and a metric by its name
  spikingbrain-plot outputs/smollm2/cpt --panels loss,throughput --metric train/grad_norm --log
"""


def plot_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    panels = "\n".join(f"  {name:<12}{panel.words}" for name, panel in PANELS.items())
    parser = command_parser(_DESCRIPTION, _EXAMPLES.format(panels=panels))
    parser.add_argument(
        "output_dirs",
        nargs="+",
        metavar="FOLDER",
        help="output_dir of a run (holds metrics.jsonl); or files of spikingbrain-evaluate --output",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("loss.png"),
        metavar="FILE",
        help="picture to write; .png, .svg and .pdf say its format (default: %(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="draw all runs from 0 on one axis instead of end to end"
    )
    parser.add_argument(
        "--names",
        type=_words,
        metavar="A,B",
        help="what to call the runs, in their order (default: the settings in which they differ, or folders)",
    )
    parser.add_argument(
        "--x",
        choices=[axis.value for axis in Axis],
        default=Axis.tokens.value,
        help="what to draw over (default: %(default)s)",
    )
    parser.add_argument(
        "--panels",
        type=_words,
        metavar="A,B",
        help=f"of {', '.join(PANELS)}, or all (default: what there is something to see of)",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="GROUP/NAME",
        help="draw a metric by its name, one of every layer without its /layer_<n>; alone, or below --panels "
        "(may be repeated)",
    )
    parser.add_argument("--log", action="store_true", help="logarithmic y axes")
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="points of the running mean of noisy curves, 1 for none (default: a thirtieth of a long curve)",
    )
    parser.add_argument(
        "--dense-cross-entropy",
        metavar="X",
        help="held-out cross entropy of the dense source, drawn as the line to reach: a number, or the file "
        "of spikingbrain-evaluate --output, which also says on which text it was measured",
    )
    return parser


def plot(arguments: Sequence[str] | None = None) -> None:
    """Draw, and say where to and what is seen."""
    parsed = plot_parser().parse_args(arguments)
    with user_errors():
        if parsed.smooth is not None and parsed.smooth < 1:
            raise ConfigurationError(f"--smooth is {parsed.smooth}; give at least 1")
        if parsed.panels == []:
            raise ConfigurationError(f"--panels is empty; name some of {', '.join(PANELS)}, or leave it out")
        if not all(parsed.metric):
            raise ConfigurationError("--metric is empty; name one, e.g. train/grad_norm, or leave it out")
        if all(Path(name).suffix == ".json" for name in parsed.output_dirs):
            _plot_evaluations(parsed)
            return
        dense = None if parsed.dense_cross_entropy is None else DenseLine.read(parsed.dense_cross_entropy)
        lines = plot_runs(
            parsed.output_dirs,
            parsed.output,
            axis=Axis(parsed.x),
            compare=parsed.compare,
            names=parsed.names,
            panels=parsed.panels,
            metrics=parsed.metric,
            options=Options(parsed.log, parsed.smooth, dense),
        )
        print("\n".join([str(parsed.output), *lines]))


def _plot_evaluations(parsed: argparse.Namespace) -> None:
    for flag in ("compare", "panels", "metric", "log", "smooth", "dense_cross_entropy"):
        if getattr(parsed, flag):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} is for runs, but {parsed.output_dirs[0]} is a report of an "
                "evaluation; leave it out"
            )
    format_of(parsed.output)
    reports = [Report.read(Path(name)) for name in parsed.output_dirs]
    if parsed.names is not None:
        if len(parsed.names) != len(reports):
            raise ConfigurationError(
                f"--names has {len(parsed.names)} names for {len(reports)} reports; give one each"
            )
        reports = [replace(report, name=name) for report, name in zip(reports, parsed.names, strict=True)]
    draw_reports(reports, parsed.output)
    print("\n".join([str(parsed.output), *(report.describe() for report in reports)]))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
