"""The panels of a picture: what a user asks for by name, and which of them there is something to draw of."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.cross_entropies import loss_views, other_loss
from spikingbrain_train.reporting.plots.expert_load import expert_views
from spikingbrain_train.reporting.plots.rows import Row
from spikingbrain_train.reporting.plots.views import (
    Options,
    View,
    last_layers_view,
    layers_view,
    lines_view,
    table_view,
)


@dataclass(frozen=True)
class Panel:
    """What a name of ``--panels`` stands for."""

    words: str
    views: Callable[[Row, Options], Sequence[View | None]]
    is_default: bool = True
    """Whether it is drawn without being asked for, where there is something to draw."""


def views_of(row: Row, panels: Sequence[str] | None, metrics: Sequence[str], options: Options) -> list[View]:
    """The axes of a picture, from top to bottom.

    Args:
        row: the runs.
        panels: names of :data:`PANELS`; ``all`` is all that there is something to draw of, None the defaults
            among them, or nothing but ``metrics`` where those are given.
        metrics: further metrics by their name: ``group/name``, or ``group/name`` of ``group/name/layer_<n>``.
        options: how values are drawn.

    Raises:
        ConfigurationError: a name that is none, or one that no run has anything of.
    """
    found: list[View] = []
    folders = ", ".join(str(run.recording.folder) for run in row.runs)
    if panels is None and not metrics or panels is not None and "all" in panels:
        for panel in PANELS.values():
            if panel.is_default or panels is not None:
                found += [view for view in panel.views(row, options) if view is not None]
        panels = [name for name in panels or [] if name != "all" and name not in PANELS]
    for name in panels or []:
        if name not in PANELS:
            raise ConfigurationError(f"there is no panel {name}; {_near(name, [*PANELS, 'all'])}")
        views = [view for view in PANELS[name].views(row, options) if view is not None]
        if not views:
            raise ConfigurationError(
                f"the panel {name} has nothing to draw: {folders} reported no {PANELS[name].words}; "
                "leave it out"
            )
        found += views
    found += [_metric_view(row, metric, options) for metric in metrics]
    if not found:
        known = list(dict.fromkeys(name for run in row.runs for name in run.recording.metrics))
        raise ConfigurationError(
            f"{folders} reported no finite loss or held-out cross entropy yet; draw a metric by its name, "
            f"--metric {known[-1]}, or wait for the first points"
        )
    return found


def _metric_view(row: Row, metric: str, options: Options) -> View:
    recordings = [run.recording for run in row.runs]
    if any(metric in each.metrics for each in recordings):
        view = lines_view(row, metric, options)
    elif any(metric in each.families for each in recordings):
        view = layers_view(row, metric, options)
    elif any(metric in each.tables for each in recordings):
        view = table_view(row, metric)
        if view is None:
            raise ConfigurationError(
                f"--metric {metric} is a table, which cannot be compared; draw one run of it"
            )
    else:
        view = None
    if view is None:
        known = {name for each in recordings for name in (*each.metrics, *each.families, *each.tables)}
        raise ConfigurationError(f"no run has a metric {metric}; {_near(metric, sorted(known))}")
    return view


def _near(name: str, known: Sequence[str]) -> str:
    """Names that the user may have meant, or all."""
    tails = {each.rpartition("/")[2]: each for each in known}
    near = difflib.get_close_matches(name, known, 3, 0.6)
    near += [tails[each] for each in difflib.get_close_matches(name.rpartition("/")[2], list(tails), 2, 0.75)]
    near += [each for each in known if name and name in each][:3]
    if near:
        return f"did you mean {' or '.join(list(dict.fromkeys(near))[:3])}?"
    shown = [each for each in known if "/layer_" not in each]
    return f"choose one of {', '.join(shown)}"


def _kl(row: Row, options: Options) -> list[View | None]:
    return [lines_view(row, "train/kl_divergence", options)]


def _alignment(row: Row, options: Options) -> list[View | None]:
    views: list[View | None] = []
    if row.is_comparison:
        equal = all(other_loss(run) for run in row.runs if run.has("align/error"))  # it is in the loss panel
        views.append(None if equal else lines_view(row, "align/error", options))
    return [*views, layers_view(row, "align/error", options)]


def _spikes(row: Row, options: Options) -> list[View | None]:
    names = dict.fromkeys(
        name
        for run in row.runs
        for name in run.recording.metrics
        if name.startswith("spiking/") and "/layer_" not in name
    )
    halves = [lines_view(row, name, options, is_wide=False) for name in names]
    family = "spiking/mean_spikes"
    over_time = layers_view(row, family, options)
    # The schedule of k hides there how layers differ; a comparison shows the end anyway.
    at_the_end = None if row.is_comparison else last_layers_view(row, family)
    return [*halves, over_time, at_the_end]


def _throughput(row: Row, options: Options) -> list[View | None]:
    return [
        lines_view(row, name, options, is_wide=False) for name in ("train/tokens_per_second", "train/mfu")
    ]


def _optimizer(row: Row, options: Options) -> list[View | None]:
    return [
        lines_view(row, name, options, is_wide=False) for name in ("train/learning_rate", "train/grad_norm")
    ]


PANELS = {
    "loss": Panel("training loss or held-out cross entropy", loss_views),
    "kl": Panel("KL divergence from a teacher", _kl),
    "alignment": Panel("alignment error", _alignment),
    "spikes": Panel("statistics of spikes", _spikes),
    "experts": Panel("load of experts", expert_views),
    "throughput": Panel("tokens per second or MFU", _throughput, is_default=False),
    "optimizer": Panel("learning rate or gradient norm", _optimizer, is_default=False),
}
