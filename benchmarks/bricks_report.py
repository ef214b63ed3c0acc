"""What the pieces of benchmarks/bricks.py gave, as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from spikingbrain_train.reporting.tables import table


def report(pieces: Mapping[str, Any]) -> list[str]:
    """A table for each piece that is there."""
    shown = {
        "neurons": _neurons,
        "abilities": _abilities,
        "moefication": _moefication,
        "predictors": _predictors,
        "adapters": _adapters,
    }
    lines: list[str] = []
    for name, rows_of in shown.items():
        if name in pieces:
            lines += [name, *table(list(rows_of(pieces[name])), left=1), ""]
    return lines


def _neurons(numbers: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["left out", "cross entropy", "perplexity", "of the whole model's"]
    for each in numbers["masked"]:
        ratio = math.exp(each["cross_entropy"] - numbers["cross_entropy"])
        perplexity = f"{each['perplexity']:.2f}"
        yield [f"{each['percent']:g} %", f"{each['cross_entropy']:.3f}", perplexity, f"{ratio:.3f} x"]


def _abilities(numbers: Mapping[str, Any]) -> Iterator[list[str]]:
    whole = numbers["cross_entropy"]
    yield ["perplexity", *numbers["abilities"]]
    yield ["whole model", *(f"{math.exp(value):.1f}" for value in whole)]
    rows = zip(numbers["abilities"], numbers["cross_entropy_without"], strict=True)
    for name, row in [*rows, ("random ones", numbers["cross_entropy_without_random"])]:
        ratios = (math.exp(value - of) for value, of in zip(row, whole, strict=True))
        yield [f"without {name}", *(f"{ratio:.2f} x" for ratio in ratios)]


def _moefication(results: Mapping[str, Any]) -> Iterator[list[str]]:
    control = results.get("control")
    yield ["cut, router", "before", "after", "tokens", "above the control"]
    for result in results.values():
        for row in result.get("rows", ()):
            yield [f"{row['partition']}, {row['router']}, masked", f"{row['cross_entropy']:.3f}", "", "", ""]
    for name, result in results.items():
        if name == "whole":
            cells = [f"{result['dense']:.6f}", f"{result['moe']:.6f}", "", ""]
            yield ["float32, dense and all experts", *cells]
        else:
            above = "" if control is None else f"{result['after'] - control['after']:+.3f}"
            cells = [f"{result['before']:.3f}", f"{result['after']:.3f}", str(result["tokens"]), above]
            yield [name, *cells]


def _predictors(numbers: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["neurons computed", "found", "left out", "cross entropy"]
    yield ["all", "100.0 %", "0.0 %", f"{numbers['cross_entropy']:.3f}"]
    for each in numbers["readings"]:
        asked = each["recall_asked_for"]
        shares = (f"{each['recall']:.1%}", f"{each['predicted_sparsity']:.1%}")
        yield ["p >= 1/2" if asked is None else f"recall {asked:g}", *shares, f"{each['cross_entropy']:.3f}"]


def _adapters(results: Mapping[str, Any]) -> Iterator[list[str]]:
    base = results.get("base", {})
    yield ["cross entropy", *base]
    for name, result in results.items():
        rows = {"": result} if name == "base" else result
        for how, of_kinds in rows.items():
            if how != "tokens":
                yield [f"{name} {how}".strip(), *(f"{value:.4f}" for value in of_kinds.values())]
