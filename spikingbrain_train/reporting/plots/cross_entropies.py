"""The panel of losses: cross entropies on one pair of axes, and what else is minimised, each on its own."""

from __future__ import annotations

import math
from typing import Any

from spikingbrain_train.reporting.plots.curves import cut_above, draw_line, draw_noisy, window_of, write_value
from spikingbrain_train.reporting.plots.dense_line import differ_in_held_out
from spikingbrain_train.reporting.plots.recording import Series
from spikingbrain_train.reporting.plots.rows import Arrangement, Row, Run, last_number
from spikingbrain_train.reporting.plots.stage_scale import share_of
from spikingbrain_train.reporting.plots.style import FAINT, line_style, number_text, shortened
from spikingbrain_train.reporting.plots.views import Options, View, lines_view

HELD_OUT, LOSS, CROSS_ENTROPY = "valid/cross_entropy", "train/loss", "train/cross_entropy"
_EQUAL = 1e-9


def loss_views(row: Row, options: Options) -> list[View | None]:
    """Cross entropies on one pair of axes, and what else is minimised, each kind on its own."""
    views: list[View | None] = []
    if row.is_comparison:
        views.append(_held_out_comparison(row, options))
        views.append(_training_cross_entropy(row, options))
    else:
        views.append(_cross_entropy(row, options))
        if row.arrangement is Arrangement.sequence and _is_squeezed(row, options):
            views.append(_cross_entropy(row.of(row.runs[1:]), options, f"from {row.runs[1].name} on"))
    kinds: dict[tuple[str, str], list[Run]] = {}
    for run in row.runs:
        if run.has(LOSS) and (kind := other_loss(run)) is not None:
            kinds.setdefault(kind, []).append(run)
    views += [
        lines_view(row, LOSS, options, title=title, unit=unit, runs=runs)
        for (title, unit), runs in kinds.items()
    ]
    return views


def other_loss(run: Run) -> tuple[str, str] | None:
    """Title and unit of what a run minimises, None where that is the cross entropy."""
    recording = run.recording
    if run.has("align/error"):
        return "Training loss: alignment error", "relative squared error"
    if run.has(CROSS_ENTROPY):
        entropy = dict(run.series(CROSS_ENTROPY))
        if all(abs(y - entropy.get(x, y)) <= _EQUAL for x, y in run.series(LOSS) if math.isfinite(y)):
            return None
        return "Training loss with all its terms", "nats per token"
    # Releases without train/cross_entropy reported it as train/loss.
    if recording.stage is not None or run.has("train/kl_divergence"):
        return None
    return "Training loss", "loss"


def _entropy_metric(run: Run) -> str | None:
    """The metric that holds a run's training cross entropy, None where it has none."""
    if run.has(CROSS_ENTROPY):
        return CROSS_ENTROPY
    return LOSS if run.has(LOSS) and other_loss(run) is None else None


def _held_out_metrics(row: Row) -> list[str]:
    """The held-out cross entropy, and that of each dataset where there are several."""
    names = dict.fromkeys(
        name for run in row.runs for name in run.recording.metrics if name.startswith(f"{HELD_OUT}/")
    )
    several = list(names) if len(names) > 1 else []
    return [*([HELD_OUT] if any(run.has(HELD_OUT) for run in row.runs) else []), *several]


def _is_squeezed(row: Row, options: Options) -> bool:
    """Whether the first stage takes so much of the axis that of the later ones little can be seen."""
    values: list[list[float]] = []
    for run in row.runs:
        metrics = [HELD_OUT, *([metric] if (metric := _entropy_metric(run)) is not None else [])]
        values.append([y for metric in metrics for _, y in run.series(metric) if math.isfinite(y)])
    later = [y for each in values[1:] for y in each]
    if options.is_log or not later or not values[0]:
        return False
    whole = max(*values[0], *later) - min(*values[0], *later)
    return whole > 3 * (max(later) - min(later))


def _cross_entropy(row: Row, options: Options, where: str = "") -> View | None:
    held_out = _held_out_metrics(row)
    trained = {id(run): metric for run in row.runs if (metric := _entropy_metric(run)) is not None}
    if not held_out and not trained:
        return None

    def draw(panel: Any) -> None:
        drawn: list[Series] = []
        labelled = False
        for run in row.runs:
            if (metric := trained.get(id(run))) is None:
                continue
            series = run.series(metric)
            window = window_of(len(series), options.smooth)
            label = "training" if window == 1 else f"training, mean of {window} points"
            draw_noisy(panel, series, line_style(0), None if labelled else label, window)
            drawn.append(series)
            labelled = True
        for number, metric in enumerate(held_out):
            label = (
                "held-out"
                if metric == HELD_OUT
                else f"held-out {shortened(metric.removeprefix(f'{HELD_OUT}/'), 24)}"
            )
            for index, run in enumerate([run for run in row.runs if run.has(metric)]):
                series, share = run.series(metric), share_of(row, run)
                width = 2.2 if metric == HELD_OUT else 1.2
                style = line_style(number + 1)
                draw_line(panel, series, style, label if index == 0 else None, width=width, share=share)
                drawn.append(series)
                if metric == HELD_OUT:
                    _write_ends(panel, series, is_first=index == 0)
        _draw_dense(panel, options)
        panel.set_ymargin(0.09)
        if not options.is_log and row.arrangement is Arrangement.one:
            cut_above(panel, drawn, _dense_value(options))

    title = (
        "Cross entropy"
        if trained and held_out
        else "Held-out cross entropy"
        if held_out
        else "Training cross entropy"
    )
    if differ_in_held_out([run.recording for run in row.runs]):
        title += " (held-out windows differ)"
    title = f"{title}, {where}" if where else title
    lines_of_legend = 0 if len(held_out) <= 2 else -(-(len(held_out) + 2) // 3)
    return View(title, "nats per token", draw, height=2.6 + 0.2 * lines_of_legend, part=row)


def _write_ends(panel: Any, series: Series, *, is_first: bool) -> None:
    finite = [point for point in series if math.isfinite(point[1])]
    if is_first and len(finite) > 1:
        write_value(panel, *finite[0], is_first=True)
    if finite:
        write_value(panel, *finite[-1], is_first=len(finite) == 1)


def _held_out_comparison(row: Row, options: Options) -> View | None:
    view = lines_view(row, HELD_OUT, options)
    if view is None:
        return None
    having = [run for run in row.runs if run.has(HELD_OUT)]

    def draw(panel: Any) -> None:
        view.draw(panel)
        _draw_dense(panel, options)
        if not options.is_log:
            cut_above(panel, [run.series(HELD_OUT) for run in having], _dense_value(options))

    differ = differ_in_held_out([run.recording for run in having])
    title = f"{view.title} (of different windows: not comparable)" if differ else view.title
    return View(title, view.unit, draw, height=2.7)


def _training_cross_entropy(row: Row, options: Options) -> View | None:
    trained = [(run, metric) for run in row.runs if (metric := _entropy_metric(run)) is not None]
    if not trained:
        return None

    def draw(panel: Any) -> None:
        drawn = []
        for run, metric in trained:
            series = run.series(metric)
            window = window_of(len(series), options.smooth)
            share = share_of(row, run)
            draw_noisy(panel, series, run.style, None, window, faint=0.2, is_one_of_many=True, share=share)
            drawn.append(series)
        if not options.is_log:
            cut_above(panel, drawn)

    windows = {window_of(len(run.series(metric)), options.smooth) for run, metric in trained}
    smoothed = (
        f" (lines: mean of {' or '.join(map(str, sorted(windows)))} points)" if max(windows) > 1 else ""
    )
    return View(f"Training cross entropy{smoothed}", "nats per token", draw, height=2.5)


def _dense_value(options: Options) -> list[float]:
    return [] if options.dense is None else [options.dense.cross_entropy]


def _draw_dense(panel: Any, options: Options) -> None:
    if options.dense is None:
        return
    value = options.dense.cross_entropy
    label = f"dense source {number_text(float(f'{value:.3g}'))}"
    panel.axhline(value, color=FAINT, linestyle=(0, (7, 3)), linewidth=1.3, label=label, zorder=2)


def final_values(run: Run) -> dict[str, float]:
    """The last numbers of the loss panel, in words -> value."""
    found = {"held-out": last_number(run.series(HELD_OUT)) if run.has(HELD_OUT) else None}
    if (metric := _entropy_metric(run)) is not None:
        found["training"] = last_number(run.series(metric))
    elif run.has(LOSS):
        found["loss"] = last_number(run.series(LOSS))
    return {words: value for words, value in found.items() if value is not None}
