"""The datasets of the run, how often each is read, and what is odd about them."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from spikingbrain_train.planning.data_plan import DataPlan, TrainSource, ValidSource, plan_data
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.reporting.quantities import quantity
from spikingbrain_train.reporting.tables import table

_UNKNOWN = "?"
_NUMBERS = 52
"""Columns that numbers may take; the rest is for prefixes."""


def data_section(plan: Plan) -> Section | None:
    """The datasets of data.train and data.valid, as far as they are here; None where none is named."""
    data = plan_data(plan.config)
    if not data.train and not data.valid:
        return None
    values = {
        "train": [_values(source) for source in data.train],
        "valid": [_values(source) for source in data.valid],
        "warnings": data.warnings(),
    }
    return Section("data", values, lambda width: _text(plan, data, width))


def _values(source: TrainSource | ValidSource) -> dict[str, Any]:
    values = asdict(source)
    size = values.pop("size") or {"documents": None, "tokens": None}
    return {**values, **size}


def _text(plan: Plan, data: DataPlan, width: int) -> list[str]:
    lines = []
    if data.train:
        rows = [["dataset", "documents", "tokens", "of the blend", "epochs"]]
        packed = any(source.examples is not None for source in data.train)
        if packed:
            rows = [["dataset", "examples", "tokens", "sequences", "filled", "of the blend", "epochs"]]
        for source in data.train:
            share = _UNKNOWN if source.share is None else f"{source.share:.1%}"
            epochs = _UNKNOWN if source.epochs is None else f"{source.epochs:,.2f}"
            rows.append([_name(source, width), *_size(source), *_packed(source, packed), share, epochs])
        lines += [
            f"training data; the stage reads {quantity(plan.total_tokens)} tokens",
            *table(rows, left=1),
        ]
    if data.valid:
        rows = [["dataset", "documents", "tokens", "sequences", "read"]]
        rows += [[_name(source, width), *_size(source), *_sequences(source)] for source in data.valid]
        lines += (
            ["", "held-out data of one evaluation", *table(rows, left=1)]
            if lines
            else [
                "held-out data of one evaluation",
                *table(rows, left=1),
            ]
        )
    for warning in data.warnings():
        lines += textwrap.wrap(f"warning: {warning}", width, break_long_words=False, break_on_hyphens=False)
    return lines


def _name(source: TrainSource | ValidSource, width: int) -> str:
    """The prefix, of a long one the end."""
    room = width - _NUMBERS
    return source.prefix if len(source.prefix) <= room else f"...{source.prefix[3 - room :]}"


def _size(source: TrainSource | ValidSource) -> list[str]:
    if source.size is None:
        return [_UNKNOWN, _UNKNOWN]
    return [f"{source.size.documents:,}", quantity(source.size.tokens)]


def _packed(source: TrainSource, packed: bool) -> list[str]:
    """How examples are packed, where a stage packs them."""
    if not packed:
        return []
    found = source.examples
    return [_UNKNOWN, _UNKNOWN] if found is None else [f"{found.sequences:,}", f"{found.fill:.1%}"]


def _sequences(source: ValidSource) -> list[str]:
    return [_UNKNOWN, _UNKNOWN] if source.size is None else [f"{source.windows:,}", f"{source.read:,}"]
