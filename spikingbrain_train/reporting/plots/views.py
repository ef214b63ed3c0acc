"""What one pair of axes shows: lines of a metric, layers as lines or colours, last values of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.reporting.plots.curves import draw_line, draw_noisy, window_of
from spikingbrain_train.reporting.plots.dense_line import DenseLine
from spikingbrain_train.reporting.plots.heat import draw_over_axis, draw_table
from spikingbrain_train.reporting.plots.quantities import Quantity, quantity_of
from spikingbrain_train.reporting.plots.recording import Series
from spikingbrain_train.reporting.plots.rows import Row, Run, last_number
from spikingbrain_train.reporting.plots.stage_scale import share_of
from spikingbrain_train.reporting.plots.style import line_style

MOST_LINES = 5
"""Layers up to which each is a line; more are rows of colours."""


@dataclass(frozen=True)
class Options:
    """How values are drawn."""

    is_log: bool = False
    """Logarithmic y axes, where all values are positive."""
    smooth: int | None = None
    """Points of a running mean of noisy series; None chooses, 1 is none."""
    dense: DenseLine | None = None
    """The line to reach."""


@dataclass(frozen=True)
class View:
    """One pair of axes."""

    title: str
    unit: str
    """Of the y axis."""
    draw: Callable[[Any], None]
    """Draws into matplotlib's Axes."""
    is_wide: bool = True
    """Else two of them stand side by side."""
    height: float = 2.2
    """Inches."""
    part: Row | None = None
    """The part of the axis that is drawn; None is all of it."""
    x_label: str | None = None
    """None where it lies over the axis that curves share."""
    is_table: bool = False
    """Whether y counts rows, which have no logarithm."""


def lines_view(
    row: Row, metric: str, options: Options, *, title: str | None = None, unit: str | None = None,
    runs: Sequence[Run] | None = None, is_wide: bool = True,
) -> View | None:  # fmt: skip
    """A metric of all runs that have it, None where none has."""
    having = [run for run in (row.runs if runs is None else runs) if run.has(metric)]
    if not having:
        return None
    words = quantity_of(metric)
    faint = 0.25 if row.is_comparison else 0.4

    def draw(panel: Any) -> None:
        for number, run in enumerate(having):
            series = scaled(run.series(metric), words.factor)
            if row.is_comparison and metric.startswith("valid/"):
                draw_line(panel, series, run.style, None, share=share_of(row, run))
                continue
            style = run.style if row.is_comparison else line_style(0)
            window = window_of(len(series), options.smooth) if words.is_noisy else 1
            label = None
            if not row.is_comparison and number == 0 and window > 1:
                label = f"mean of {window} points"
            draw_noisy(
                panel, series, style, label, window, faint=faint, is_one_of_many=row.is_comparison,
                share=share_of(row, run),
            )  # fmt: skip
        if words.is_from_zero and not options.is_log:
            panel.set_ylim(bottom=0.0)

    part = row.of(having)
    told = title or words.title
    if part is not row and len(part.runs) < len(row.runs):
        is_wide = is_wide and len(part.runs) > 1
    return View(told, unit or words.unit, draw, is_wide, 2.2 if is_wide else 1.9, part)


def layers_view(row: Row, family: str, options: Options) -> View | None:
    """A metric of each layer: lines of few, colours of many, and of several runs the last value of each."""
    having = [run for run in row.runs if run.recording.layers(family)]
    if not having:
        return None
    words = quantity_of(family)
    if row.is_comparison:
        return last_layers_view(row, family)
    layers = sorted({layer for run in having for layer in run.recording.layers(family)})
    if len(layers) <= MOST_LINES:
        return _layer_lines_view(row.of(having), having, family, words, options)
    height = max(1.9, min(3.6, 0.07 * len(layers) + 1.0))

    def draw(panel: Any) -> None:
        rows = _on_the_same_places([_of_layer(having, family, layer, words.factor) for layer in layers])
        draw_over_axis(panel, rows, [str(layer) for layer in layers], having[-1].end, height)

    title, part = f"{_per_layer(words.title)}: {words.unit}", row.of(having)
    return View(title, "layer", draw, height=height, part=part, is_table=True)


def _of_layer(runs: Sequence[Run], family: str, layer: int, factor: float) -> Series:
    """The values of a layer in all runs that have it."""
    metrics = [(run, run.recording.layers(family).get(layer)) for run in runs]
    return [point for run, metric in metrics if metric for point in scaled(run.series(metric), factor)]


def _on_the_same_places(rows: Sequence[Series]) -> list[Series]:
    """Rows with a point at every place of any of them, NaN where a row has none."""
    places = sorted({x for row in rows for x, _ in row})
    found = [dict(row) for row in rows]
    return [[(x, values.get(x, math.nan)) for x in places] for values in found]


def _layer_lines_view(
    part: Row, having: Sequence[Run], family: str, words: Quantity, options: Options
) -> View:
    def draw(panel: Any) -> None:
        labelled: set[int] = set()
        for run in having:
            for number, (layer, metric) in enumerate(run.recording.layers(family).items()):
                series = scaled(run.series(metric), words.factor)
                window = window_of(len(series), options.smooth) if words.is_noisy else 1
                label = None if layer in labelled else f"layer {layer}"
                labelled.add(layer)
                draw_noisy(panel, series, line_style(number), label, window, faint=0.2, is_one_of_many=True)

    return View(_per_layer(words.title), words.unit, draw, part=part)


def last_layers_view(row: Row, family: str) -> View | None:
    """The last value of each layer: of all runs that are compared, or of the last stage that has any."""
    having = [run for run in row.runs if run.recording.layers(family)]
    if not having:
        return None
    words, shown = quantity_of(family), having if row.is_comparison else having[-1:]

    def draw(panel: Any) -> None:
        for run in shown:
            points: Series = []
            for layer, metric in run.recording.layers(family).items():
                value = last_number(scaled(run.series(metric), words.factor))
                points.append((float(layer), math.nan if value is None else value))
            draw_line(panel, points, run.style if row.is_comparison else line_style(0), None)
        panel.xaxis.get_major_locator().set_params(integer=True)

    return View(f"{_per_layer(words.title)}, at the end", words.unit, draw, height=1.9, x_label="layer")


def table_view(row: Row, metric: str) -> View | None:
    """The last table of the last run that has one: layers over experts."""
    run = next((each for each in reversed(row.runs) if each.recording.last_table(metric)), None)
    if run is None or row.is_comparison:
        return None
    rows = run.recording.last_table(metric)
    assert rows is not None
    layers = [str(layer) for layer in run.recording.layers("moe/load_max_over_mean")]
    if metric != "moe/expert_load" or len(layers) != len(rows):
        layers = [str(number) for number in range(len(rows))]
    words, is_load = quantity_of(metric), metric == "moe/expert_load"
    height = max(1.5, min(3.6, 0.11 * len(rows) + 1.0))

    def draw(panel: Any) -> None:
        draw_table(panel, rows, layers, height, 2.0 if is_load else 0.0)

    title = f"{words.title} at the end (1 is an even spread)" if is_load else f"{words.title}, at the end"
    return View(title, "layer" if is_load else "row", draw, height=height,
                x_label="expert" if is_load else "column", is_table=True)  # fmt: skip


def scaled(series: Series, factor: float) -> Series:
    """Values in the unit that is drawn."""
    return series if factor == 1.0 else [(x, factor * y) for x, y in series]


def _per_layer(title: str) -> str:
    return f"{title.removesuffix(', mean of layers').removesuffix(' of all layers')} per layer"
