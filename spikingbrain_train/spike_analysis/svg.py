"""Charts as SVG inside of a page: colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460
"""Of every chart, in its own units: text of 12 stays readable on a phone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34


def svg(height: float, label: str, *parts: str) -> str:
    """A chart that is as wide as its place.

    Args:
        height: in units of WIDTH.
        label: what a screen reader says.
        parts: elements.
    """
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "tick") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, title: str, style: str = "") -> str:
    """A rectangle that says something when pointed at."""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" class="{kind}"'
        f"{f' style={chr(34)}{style}{chr(34)}' if style else ''}><title>{escape(title)}</title></rect>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def bars(names: Sequence[str], shares: Sequence[float], label: str, axis: str, marked: Sequence[int]) -> str:
    """A bar for each share.

    Args:
        names: of the bars; every other is written where there are many.
        shares: 0 to 1.
        label: of the whole.
        axis: under it.
        marked: indices of bars in the second colour.
    """
    height, bottom = 230.0, 230.0 - _BOTTOM
    ticks = _round_values(0.0, max([*shares, 1e-9]))
    most = max(ticks[-1], *shares)
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(shares))
    every = 1 + len(names) // 13
    parts = _ticks_up(0.0, most, ticks, bottom, "{:.3g}%", 100.0)
    for index, (name, share) in enumerate(zip(names, shares, strict=True)):
        tall = share / most * (bottom - _TOP)
        x = _LEFT + index * step
        kind = "second" if index in marked else "first"
        parts.append(rect(x + step * 0.1, bottom - tall, step * 0.8, tall, kind, f"{name}: {share:.2%}"))
        if (index - len(names) // 2) % every == 0:
            parts.append(text(x + step / 2, bottom + 14, name))
    parts.append(text((WIDTH + _LEFT) / 2, height - 3, axis, kind="axis"))
    return svg(height, label, *parts)


@dataclass(frozen=True)
class Series:
    """Points that a line connects."""

    name: str
    kind: str
    """CSS class of its colour."""
    points: Sequence[tuple[float, float]]


def lines(series: Sequence[Series], label: str, axis: str, shown: str, level: float | None = None) -> str:
    """Lines over one axis.

    Args:
        series: at least one, with points.
        label: of the whole.
        axis: under it.
        shown: how a value is written.
        level: of a horizontal line to compare with.
    """
    height, bottom = 230.0, 230.0 - _BOTTOM
    xs = sorted({x for each in series for x, _ in each.points})
    ys = [y for each in series for _, y in each.points] + ([] if level is None else [level])
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.1 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad
    width = WIDTH - _LEFT - _RIGHT - 30
    across = (xs[-1] - xs[0]) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + 15 + (x - xs[0]) / across * width, bottom - (y - low) / (high - low) * (bottom - _TOP)

    parts = _ticks_up(low, high, _round_values(low, high), bottom, shown)
    parts += [text(at(x, low)[0], bottom + 14, f"{x:g}") for x in xs]
    if level is not None:
        _, y = at(xs[0], level)
        parts.append(line(_LEFT, y, WIDTH - _RIGHT, y, "level"))
    for each in series:
        places = [at(*point) for point in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" class="line {each.kind}-line"/>')
        for (x, y), (k, value) in zip(places, each.points, strict=True):
            title = escape(f"{each.name} at {k:g}: {shown.format(value)}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{each.kind}">'
                f"<title>{title}</title></circle>"
            )
    parts.append(text((WIDTH + _LEFT) / 2, height - 3, axis, kind="axis"))
    return svg(height, label, *parts)


def heat(
    rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float], label: str
) -> str:
    """A grid whose cells are the stronger the larger their value; what has none stays empty.

    Args:
        rows: names, written at the left.
        columns: names, some of them written at the bottom.
        values: by row and column.
        label: of the whole.
    """
    left, cell = 150.0, 17.0
    height = cell * len(rows) + _BOTTOM
    step = (WIDTH - left - 4) / max(1, len(columns))
    low, high = min(values.values()), max(values.values())
    parts = []
    last = [_last_name(row) for row in rows]
    for index, row in enumerate(rows):
        name = last[index] if last.count(last[index]) == 1 else row
        parts.append(text(left - 5, index * cell + 12.5, _short(name), "end"))
        for place, column in enumerate(columns):
            if (row, column) in values:
                value = values[row, column]
                strength = 0.12 + 0.88 * (value - low) / ((high - low) or 1.0)
                title = f"{row}, layer {column}: {value:.3f}"
                parts.append(
                    rect(
                        left + place * step,
                        index * cell + 1,
                        max(step - 0.6, 0.4),
                        cell - 2,
                        "first",
                        title,
                        f"fill-opacity:{strength:.2f}",
                    )
                )
    every = 1 + len(columns) // 10
    for place in range(0, len(columns), every):
        parts.append(text(left + (place + 0.5) * step, height - 20, columns[place]))
    parts.append(text((WIDTH + left) / 2, height - 4, "layer", kind="axis"))
    return svg(height, label, *parts)


def _last_name(path: str) -> str:
    """The end of a path that says something: ``gk_proj.0`` of ``self_attn.gk_proj.0``."""
    parts = path.split(".")
    named = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[named:])


def spikes(trains: Sequence[Sequence[Sequence[int]]], label: str) -> str:
    """A raster: time to the right, token after token, a row for each neuron.

    Args:
        trains: [tokens][steps][neurons] of -1, 0, 1.
        label: of the whole.
    """
    neurons, steps = len(trains[0][0]), len(trains[0])
    left, row = 22.0, 4.0
    width, height = WIDTH - left - 4, neurons * row
    step = width / (len(trains) * steps)
    drawn = max(step * 0.85, 0.35)
    positive: list[str] = []
    negative: list[str] = []
    for token, train in enumerate(trains):
        for at, slots in enumerate(train):
            for neuron, spike in enumerate(slots):
                if spike:
                    x, y = left + (token * steps + at) * step, neuron * row + 0.4
                    place = f"M{x:.2f} {y:.1f}h{drawn:.2f}v{row - 0.8:.1f}h-{drawn:.2f}z"
                    (positive if spike > 0 else negative).append(place)
    parts = [
        line(left + token * steps * step, 0, left + token * steps * step, height, "grid")
        for token in range(len(trains) + 1)
    ]
    parts.append(f'<path d="{"".join(positive)}" class="first"/>')
    parts.append(f'<path d="{"".join(negative)}" class="second"/>')
    for token in range(len(trains)):
        parts.append(text(left + (token + 0.5) * steps * step, height + 13, str(token)))
    parts.append(
        f'<text x="12" y="{height / 2:.0f}" text-anchor="middle" class="axis" '
        f'transform="rotate(-90 12 {height / 2:.0f})">neuron</text>'
    )
    parts.append(text((WIDTH + left) / 2, height + 28, f"token, {steps} steps each", kind="axis"))
    return svg(height + 32, label, *parts)


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in between, three to seven of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(power * each for each in (5, 2, 1) if power * each <= (high - low) / 2.5)
    return [step * each for each in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ticks_up(
    low: float, high: float, values: Sequence[float], bottom: float, shown: str, times: float = 1.0
) -> list[str]:
    parts = []
    for value in values:
        y = bottom - (bottom - _TOP) * (value - low) / (high - low)
        parts += [
            line(_LEFT, y, WIDTH - _RIGHT, y, "grid"),
            text(_LEFT - 5, y + 4, shown.format(times * value), "end"),
        ]
    return parts


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
