"""Pictures of a run: the loss curves of its stages, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikingbrain_train.config.errors import DataError, PlatformError
from spikingbrain_train.training.metrics import METRICS_FILE, read_metrics

_TRAIN_COLOUR, _VALID_COLOUR = "#4477aa", "#cc3311"


def plot_loss_curves(
    output_dirs: Sequence[str | Path], destination: str | Path, titles: Sequence[str] | None = None
) -> None:
    """Draw the training loss and the held-out cross entropy of one or several runs into one PNG.

    Each run gets a panel with its own axes, left to right in the given order, because an alignment loss and a
    cross entropy have no common scale.

    Args:
        output_dirs: folders with a ``metrics.jsonl``.
        destination: the PNG; an existing one is replaced.
        titles: one per folder; folder names by default.

    Raises:
        DataError: a folder has no metrics, or none that can be drawn.
        PlatformError: ``destination`` cannot be written.
    """
    # The Figure class draws without pyplot, so no display is asked for and no figure outlives this call.
    from matplotlib.figure import Figure

    directories = [Path(directory) for directory in output_dirs]
    titles = [directory.resolve().name for directory in directories] if titles is None else titles
    figure = Figure(figsize=(5.2 * len(directories), 3.8), layout="constrained")
    panels = figure.subplots(1, len(directories), squeeze=False)[0]
    for panel, directory, title in zip(panels, directories, titles, strict=True):
        points = read_metrics(directory)
        train, valid = _series(points, "train/loss"), _series(points, "valid/cross_entropy")
        if not train and not valid:
            raise DataError(
                f"{directory / METRICS_FILE} has no finite train/loss or valid/cross_entropy to draw; "
                "train for at least logging.log_interval iterations."
            )
        if train:
            panel.plot(*zip(*train, strict=True), color=_TRAIN_COLOUR, linewidth=1.2, label="training loss")
        if valid:
            panel.plot(
                *zip(*valid, strict=True),
                color=_VALID_COLOUR,
                linestyle="",
                marker="o",
                label="held-out cross entropy",
            )
            last_iteration, last_value = valid[-1]
            panel.annotate(
                f"{last_value:.3f}",
                (last_iteration, last_value),
                xytext=(-6, 8),
                textcoords="offset points",
                ha="right",
            )
        panel.set(title=title, xlabel="iteration")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    panels[0].set_ylabel("loss (cross entropy: nats per token)")
    _save(figure, Path(destination))


def _series(points: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """``(iteration, value)`` of one metric; points without it or with a non-finite value are skipped."""
    return [(point["iteration"], point[name]) for point in points if point.get(name) is not None]


def _save(figure: Any, destination: Path) -> None:
    temporary = destination.with_name(destination.name + ".tmp")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=130)
        os.replace(temporary, destination)
    except OSError as error:
        raise PlatformError(
            f"{destination} cannot be written ({error.strerror}); choose another file."
        ) from error
