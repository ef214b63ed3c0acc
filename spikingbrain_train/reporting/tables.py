"""Columns of text that fit a terminal, and ranges of numbers that say a long list in few words."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

_NARROWEST, _WIDEST = 80, 120
_INDENT = 12


def terminal_width() -> int:
    """Columns for a report: those of the terminal (or COLUMNS), but 80 to 120; 100 into a file."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, _NARROWEST), _WIDEST)


def facts(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Names with what is to be said of each beside them, wrapped; an empty name goes on with that above."""
    lines = []
    for name, text in rows:
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=f"{name:<{_INDENT}}",
            subsequent_indent=" " * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of cells, so many columns of them set flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """:func:`aligned` rows, of which the first is the header, with a rule under it."""
    text = aligned(rows, left)
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def packed(parts: Sequence[str], separator: str, width: int) -> list[str]:
    """Parts behind one another, on as few lines of at most so many columns as they need, if each fits one."""
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(separator) + len(part) > width:
            lines.append("")
        lines[-1] += separator + part if lines[-1] else part
    return lines


def spans(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in few words: ``0-3``, ``0-26 even``, ``6-27 every 7th``, ``0-2, 5``."""
    parts, rest = [], list(numbers)
    while rest:
        length = _progression(rest)
        step = rest[1] - rest[0] if length > 1 else 1
        if length > 2 or (length == 2 and step == 1):
            parts.append(f"{rest[0]}-{rest[length - 1]}{_step(step, rest[0])}")
        else:
            length = 1
            parts.append(str(rest[0]))
        rest = rest[length:]
    return ", ".join(parts)


def _progression(numbers: Sequence[int]) -> int:
    """How many of the first numbers lie equally far apart."""
    length = min(len(numbers), 2)
    while length < len(numbers) and numbers[length] - numbers[length - 1] == numbers[1] - numbers[0]:
        length += 1
    return length


def _step(step: int, first: int) -> str:
    if step == 1:
        return ""
    if step == 2:
        return " odd" if first % 2 else " even"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(step % 10 if step % 100 not in (11, 12, 13) else 0, "th")
    return f" every {step}{ending}"
