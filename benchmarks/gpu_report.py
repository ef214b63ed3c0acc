"""The tables of what benchmarks/gpu.py has measured: only cells that are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_ops import timing_row
from benchmarks.gpu_pieces import PIECES, Results, Row, best_seconds, median_seconds, stated_peak
from benchmarks.training_step import LOSS_BOUND


def report(output: Path) -> str:
    """Markdown of all that is measured in a folder, with what is missing named below.

    Raises:
        ConfigurationError: a file of results is damaged.
    """
    found = {name: Results.read(output, name) for name in PIECES}
    measured = {name: results for name, results in found.items() if results.cells}
    machines = {tuple(results.machine.values()): results.machine for results in measured.values()}
    lines = ["# On a GPU", ""]
    lines += [", ".join(f"{name} {value}" for name, value in each.items()) for each in machines.values()]
    rows = [(results, row) for results in measured.values() for row in results.cells.values()]
    for heading, table in (
        ("Kernels against the naive forms", _errors(row for _, row in rows)),
        ("Kernels against what could be called instead", _times(row for _, row in rows)),
        ("Training steps, batch 1, bf16", _steps(rows)),
        ("The demo's losses on CPU and GPU", _losses(row for _, row in rows)),
    ):
        body = list(table)
        lines += ["", f"## {heading}", "", *body] if body else []
    missing = [
        f"{name} ({', '.join(cells)})" for name in PIECES if (cells := found[name].missing(PIECES[name]))
    ]
    lines += ["", f"Not measured, or not to its end: {'; '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def _table(head: str, body: Iterable[str]) -> Iterator[str]:
    """With its head, where it has rows."""
    rows = list(body)
    if rows:
        yield head
        yield "|---" * (head.count("|") - 1) + "|"
        yield from rows


def _errors(rows: Iterable[Row]) -> Iterator[str]:
    body = [
        "| {kernel} | {case} | {error} |".format(**each) for row in rows for each in row.get("errors", [])
    ]
    return _table("| kernel | case | largest relative error of output and gradients |", body)


def _times(rows: Iterable[Row]) -> Iterator[str]:
    body = [timing_row(each) for row in rows for each in row.get("times", [])]
    return _table("| op | tokens | contender | forward and backward | against ours |", body)


def _steps(rows: Iterable[tuple[Results, Row]]) -> Iterator[str]:
    head = (
        "| model | layers | tokens | recompute | contender | best step | median | tokens/s "
        "| MFU, of the peak sold | MFU, of a product | peak memory | planned | real over planned "
        "| first step |"
    )
    shown = [_step(*each) for each in rows if "peak_gib" in each[1] or "failed" in each[1]]
    return _table(head, shown)


def _step(results: Results, row: Row) -> str:
    planned, real = row.get("planned_gib"), row.get("peak_gib")
    shown: list[Any] = [row["model"], row["layers"], row["tokens"], row["recompute"], row["contender"]]
    if "failed" in row:
        shown += [row["failed"], "", "", "", "", "", _shown(planned, "{:.1f} GiB"), "", ""]
        return "| " + " | ".join(str(cell) for cell in shown) + " |"
    best, median = best_seconds(row), median_seconds(row)
    rate = None if best is None else row["step_flops"] / best / 1e12
    shown += [
        _shown(best, "{:.3f} s"),
        _shown(median, "{:.3f} s"),
        "" if best is None else f"{row['tokens'] / best:.0f}",
        _shown(_ratio(rate, stated_peak(results.machine)), "{:.1%}"),
        _shown(_ratio(rate, row.get("product_tflops")), "{:.1%}"),
        _shown(real, "{:.2f} GiB"),
        _shown(planned, "{:.2f} GiB"),
        _shown(_ratio(real, planned), "{:.2f}"),
        _shown(row.get("first_step_seconds"), "{:.0f} s"),
    ]
    return "| " + " | ".join(str(cell) for cell in shown) + " |"


def _losses(rows: Iterable[Row]) -> Iterator[str]:
    body = []
    for row in rows:
        for stage, losses in row.get("losses", {}).items():
            pairs = list(zip(losses.get("cpu", []), losses.get("cuda", []), strict=False))
            if pairs:
                worst = max(abs(cpu - cuda) for cpu, cuda in pairs)
                verdict = "within" if worst <= LOSS_BOUND else "ABOVE"
                body.append(f"| {stage} | {len(pairs)} | {worst:.1e} | {verdict} {LOSS_BOUND:g} |")
    return _table("| stage | steps | largest difference | bound |", body)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else form.format(number)
