"""What a part of a plan's report is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """One part of the report. Its maker takes a Plan and stands in ``report.SECTIONS``."""

    name: str
    """What the JSON form calls it."""
    facts: Any
    """What it says, for programs: numbers, texts, lists and dicts of them. Memory in bytes, time in seconds
    or hours as the names say."""
    text: Callable[[int], list[str]]
    """What it says, for people: lines of at most so many columns, as far as its table allows."""
