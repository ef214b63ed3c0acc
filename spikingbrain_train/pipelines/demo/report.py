"""The demo's outcome: one table, as text, Markdown and JSON, beside the loss curve."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError
from spikingbrain_train.pipelines.demo.runner import StepRecord, printable
from spikingbrain_train.pipelines.demo.steps import DemoOptions, Step
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.storage.durable_files import write_text_durably
from spikingbrain_train.training.metrics import read_metrics
from spikingbrain_train.training.plots import plot_loss_curves

PICTURE, MARKDOWN, JSON = "loss.png", "demo_report.md", "demo_report.json"


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a column does not apply."""

    label: str
    tokens_seen: int | None = None
    """Training tokens up to here, over all stages."""
    cross_entropy: float | None = None
    """Held-out, nats per token."""
    tokens_per_second: float | None = None
    seconds: float | None = None
    """Wall time of the step."""


@dataclass(frozen=True)
class Stage:
    """What the metrics of one training stage say."""

    tokens: int
    tokens_per_second: float
    """Mean over the stage, evaluation and checkpoints left out."""
    first_cross_entropy: float
    last_cross_entropy: float


def read_stage(run: Path) -> Stage:
    """Sum up the metrics of a finished run.

    Raises:
        DataError: no metrics, or no evaluation among them.
    """
    points = read_metrics(run)
    valid = [point["valid/cross_entropy"] for point in points if point.get("valid/cross_entropy") is not None]
    train = [point for point in points if point.get("train/tokens_per_second")]
    if len(valid) < 2 or not train:
        raise DataError(f"{run} has no evaluation before and after its training; run the demo with --fresh")
    seconds, seen = 0.0, 0.0
    for point in train:
        seconds += (point["train/tokens"] - seen) / point["train/tokens_per_second"]
        seen = point["train/tokens"]
    return Stage(int(seen), seen / seconds, valid[0], valid[-1])


def table_rows(options: DemoOptions, steps: Sequence[Step], records: Mapping[str, StepRecord]) -> list[Row]:
    """The table: one row a step, with what it measured."""
    output = options.output
    align, cpt = read_stage(output / "align"), read_stage(output / "cpt")
    dense, export, generation = (
        _read_json(output / f"{name}.json") for name in ("evaluate_dense", "evaluate_export", "generate")
    )
    total = align.tokens + cpt.tokens
    measured: dict[str, tuple[str, int | None, float | None, float | None]] = {
        "download": ("download", None, None, None),
        "preprocess": ("tokenize", None, None, None),
        "dense": ("copy to Megatron's format", None, None, None),
        "measure": ("measure this machine", None, None, None),
        "evaluate_dense": ("dense source", 0, dense["cross_entropy"], dense["tokens"] / dense["seconds"]),
        "hybrid": ("right after the swap", 0, align.first_cross_entropy, None),
        "align": ("after the align stage", align.tokens, align.last_cross_entropy, align.tokens_per_second),
        "cpt": ("after the cpt stage", total, cpt.last_cross_entropy, cpt.tokens_per_second),
        "export": ("export", None, None, None),
        "evaluate_export": (
            "export, read back by transformers",
            total,
            export["cross_entropy"],
            export["tokens"] / export["seconds"],
        ),
        "generate": ("generate", None, None, generation["tokens_per_second"]),
    }
    ran = {step.name for step in steps}
    rows = [Row(*cells, seconds=records[name].seconds) for name, cells in measured.items() if name in ran]
    return [*rows, Row("in all", seconds=sum(records[step.name].seconds for step in steps))]


def render_table(rows: Sequence[Row], *, markdown: bool) -> str:
    """The table as aligned text, or as Markdown that is aligned too."""
    header = ["", "tokens seen", "held-out cross entropy", "tokens/s", "wall time"]
    cells = [header] + [
        [
            row.label,
            "" if row.tokens_seen is None else f"{row.tokens_seen:,}",
            "" if row.cross_entropy is None else f"{row.cross_entropy:.3f}",
            "" if row.tokens_per_second is None else _speed(row.tokens_per_second),
            "" if row.seconds is None else format_duration(row.seconds),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    edge, between = ("| ", " | ") if markdown else ("  ", "   ")
    lines = [
        edge
        + between.join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + (" |" if markdown else "")
        for line in cells
    ]
    if markdown:
        rule = "|" + "|".join(
            "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
            for column, width in enumerate(widths)
        )
        lines.insert(1, rule + "|")
    else:
        rule = "  " + "-" * (len(lines[0]) - 2)
        lines.insert(1, rule)
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)


def write_report(options: DemoOptions, steps: Sequence[Step], records: Mapping[str, StepRecord]) -> str:
    """Write picture, Markdown and JSON into the output folder.

    Returns:
        The table as text, with the places of the files below it.
    """
    output = options.output
    rows = table_rows(options, steps, records)
    dense = _read_json(output / "evaluate_dense.json")
    generation = _read_json(output / "generate.json")
    plot_loss_curves(
        [output / "align", output / "cpt"],
        output / PICTURE,
        titles=["align", "cpt"],
        dense_cross_entropy=dense["cross_entropy"],
    )
    machine = _machine()
    held_out = f"{dense['tokens']:,} tokens in windows of {dense['seq_length']}"
    content = {
        "model": str(options.source),
        "data": list(options.data),
        "held_out": {key: dense[key] for key in ("tokens", "windows", "seq_length")},
        "machine": machine,
        "lengths": options.lengths.sentence,
        "rows": [asdict(row) for row in rows],
        "generation": generation,
        "commands": [printable(step.command) for step in steps],
    }
    write_text_durably(output / JSON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    lines = [
        f"# {options.source.name}, from dense to hybrid",
        "",
        render_table(rows, markdown=True),
        "",
        f"Text: {', '.join(options.data)}; held out: {held_out}. Cross entropy in nats per token, always of "
        "the same windows: the dense source and the export in float32 by transformers, the stages in their "
        "training precision by megatron-core.",
        "",
        "Machine: {processor}, {cores} cores, Python {python}, torch {torch}, megatron-core {megatron-core}, "
        "transformers {transformers}.".format(**machine),
        "",
        *([f"Lengths: {options.lengths.sentence}.", ""] if options.lengths.sentence else []),
        f"![loss curves]({PICTURE})",
        "",
        "## Generated",
        "",
        *(f"> {line}" for line in generation["text"].splitlines()),
        "",
        "## Commands",
        "",
        "```bash",
        *(line for step in steps for line in (f"# {step.title}", printable(step.command))),
        "```",
    ]
    write_text_durably(output / MARKDOWN, "\n".join(lines) + "\n")
    places = "\n".join(f"  {output / name}" for name in (PICTURE, MARKDOWN, JSON, "export"))
    return f"{render_table(rows, markdown=False)}\n\n  held-out text: {held_out}\n\n{places}"


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"


def _machine() -> dict[str, Any]:
    packages = ("torch", "megatron-core", "transformers")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run the demo again with --fresh") from error
