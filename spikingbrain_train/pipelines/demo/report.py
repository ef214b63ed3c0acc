"""``python -m spikingbrain_train.pipelines.demo.report``: the demo's outcome as a table and a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.errors import DataError
from spikingbrain_train.layer_choice.request import RESULT_FILE
from spikingbrain_train.pipelines.state import State, StepRecord
from spikingbrain_train.pipelines.steps import printable
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.reporting.plots.dense_line import DenseLine
from spikingbrain_train.reporting.plots.plot import plot_runs
from spikingbrain_train.reporting.plots.views import Options
from spikingbrain_train.storage.durable_files import write_text_durably

PICTURE, MARKDOWN, JSON, TABLE = "loss.png", "demo_report.md", "demo_report.json", "demo_report.txt"


def report_command_line(arguments: Sequence[str] | None = None) -> None:
    """``python -m spikingbrain_train.pipelines.demo.report``."""
    parser = argparse.ArgumentParser(prog="report", description="Sum up what the demo has measured.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the demo")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the dense source")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="texts that it trained on")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="what was fitted to the machine")
    parsed = parser.parse_args(arguments)
    with user_errors():
        lengths = "" if parsed.lengths is None else _read_json(parsed.lengths)["sentence"]
        write_report(parsed.output, parsed.model, parsed.data, lengths, State(parsed.output).records)
        print(parsed.output / MARKDOWN)


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


def table_rows(output: Path, records: Mapping[str, StepRecord]) -> list[Row]:
    """The table: one row a step of the demo in ``output``, with what it measured."""
    align, cpt = read_stage(output / "align"), read_stage(output / "cpt")
    dense, export, generation = (
        _read_json(output / f"{name}.json") for name in ("evaluate_dense", "evaluate_export", "generate")
    )
    total = align.tokens + cpt.tokens
    measured: dict[str, tuple[str, int | None, float | None, float | None]] = {
        "source": ("download", None, None, None),
        "preprocess": ("tokenize", None, None, None),
        "dense": ("copy to Megatron's format", None, None, None),
        "choose": ("choose the layers to swap", None, None, None),
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
    rows = [Row(*cells, seconds=records[name].seconds) for name, cells in measured.items() if name in records]
    return [*rows, Row("in all", seconds=sum(record.seconds for record in records.values()))]


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


def write_report(
    output: Path, model: Path, data: Sequence[str], lengths: str, records: Mapping[str, StepRecord]
) -> str:
    """Write picture, Markdown, JSON and, at last, the table as text into the demo's folder.

    Args:
        output: the folder.
        model: Hugging Face folder of the dense source.
        data: texts that were trained on.
        lengths: what was fitted to the machine, a sentence or nothing.
        records: the demo's steps.

    Returns:
        The table as text, with the paths of the files below it.
    """
    rows = table_rows(output, records)
    dense = _read_json(output / "evaluate_dense.json")
    generation = _read_json(output / "generate.json")
    plot_runs(
        [output / "align", output / "cpt"],
        output / PICTURE,
        options=Options(dense=DenseLine.read(str(output / "evaluate_dense.json"))),
    )
    machine = _machine()
    held_out = f"{dense['tokens']:,} tokens in windows of {dense['seq_length']}{_chosen_on(output)}"
    content = {
        "model": str(model),
        "data": list(data),
        "held_out": {key: dense[key] for key in ("tokens", "windows", "seq_length")},
        "machine": machine,
        "lengths": lengths,
        "rows": [asdict(row) for row in rows],
        "generation": generation,
        "commands": [printable(record.command) for record in records.values()],
    }
    write_text_durably(output / JSON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    lines = [
        f"# {model.name}, from dense to hybrid",
        "",
        render_table(rows, markdown=True),
        "",
        f"Text: {', '.join(data)}; held out: {held_out}. Cross entropy in nats per token, always of "
        "the same windows: the dense source and the export in float32 by transformers, the stages in their "
        "training precision by megatron-core.",
        "",
        "Machine: {processor}, {cores} cores, Python {python}, torch {torch}, megatron-core {megatron-core}, "
        "transformers {transformers}.".format(**machine),
        "",
        *([f"Lengths: {lengths}.", ""] if lengths else []),
        f"![loss curves]({PICTURE})",
        "",
        "## Generated",
        "",
        *(f"> {line}" for line in generation["text"].splitlines()),
        "",
        "## Commands",
        "",
        "```bash",
        *(line for record in records.values() for line in (f"# {record.title}", printable(record.command))),
        "```",
    ]
    write_text_durably(output / MARKDOWN, "\n".join(lines) + "\n")
    files = "\n".join(f"  {output / name}" for name in (PICTURE, MARKDOWN, JSON, "export"))
    table = f"{render_table(rows, markdown=False)}\n\n  held-out text: {held_out}\n\n{files}"
    if lengths:
        table = f"{lengths}\n\n{table}"
    write_text_durably(output / TABLE, f"{table}\n")
    return table


def _chosen_on(output: Path) -> str:
    """What layers were chosen on; nothing where they were not chosen."""
    result = output / "choose" / RESULT_FILE
    if not result.is_file():
        return ""
    settings = _read_json(result)["settings"]
    return (
        f"; layers were chosen on {settings['tokens']:,} others, of the training text"
        if settings["data"] == [str(output / "data" / "text_train")]
        else f"; layers were chosen on {settings['tokens']:,} tokens of {', '.join(settings['data'])}"
    )


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


if __name__ == "__main__":
    report_command_line()
