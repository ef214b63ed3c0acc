"""The whole report: its sections in order, as text and as plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spikingbrain_train.planning.plan_report.cluster import cluster_section
from spikingbrain_train.planning.plan_report.data import data_section
from spikingbrain_train.planning.plan_report.hours import time_section
from spikingbrain_train.planning.plan_report.layers import layers_section
from spikingbrain_train.planning.plan_report.memory import memory_section
from spikingbrain_train.planning.plan_report.notes import notes_section
from spikingbrain_train.planning.plan_report.run import run_section
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.reporting.tables import terminal_width

Maker = Callable[[Plan], Section | None]

SECTIONS: list[Maker] = [
    run_section,
    cluster_section,
    time_section,
    data_section,
    layers_section,
    memory_section,
    notes_section,
]
"""Makers of sections, from top to bottom. One that has nothing to say of a plan returns None."""

_BESIDE_EACH_OTHER = {"run", "cluster", "time"}
"""Sections of facts, with no empty line between them."""


def sections(plan: Plan, more: Sequence[Maker] = ()) -> list[Section]:
    """What there is to say of a plan.

    Args:
        plan: the plan.
        more: makers of sections of rooms above this one, whose sections come last.

    Raises:
        DataError: cluster.measured_in names a folder in which no run has measured its speed.
    """
    return [section for make in (*SECTIONS, *more) if (section := make(plan)) is not None]


def render(plan: Plan, width: int | None = None, more: Sequence[Maker] = ()) -> str:
    """The plan as text.

    Args:
        width: columns; null takes the terminal's, 80 to 120.
        more: as :func:`sections`.

    Raises:
        DataError: as :func:`sections`.
    """
    lines: list[str] = []
    for section in sections(plan, more):
        if lines and section.name not in _BESIDE_EACH_OTHER:
            lines.append("")
        lines += section.text(width or terminal_width())
    return "\n".join(lines)


def as_values(plan: Plan, more: Sequence[Maker] = ()) -> dict[str, Any]:
    """The plan as plain values, which JSON takes: one entry a section.

    Raises:
        DataError: as :func:`sections`.
    """
    return {section.name: section.facts for section in sections(plan, more)}
