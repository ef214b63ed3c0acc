"""Pictures of runs: held-out cross entropy across stages, and the training loss of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError, PlatformError
from spikingbrain_train.reporting.metrics import METRICS_FILE, read_metrics
from spikingbrain_train.storage.durable_files import replaced_durably

# Paul Tol's bright scheme: told apart in print and by colour-blind readers.
_STAGE_COLOURS = ("#4477aa", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#ee6677")
_INK, _FAINT = "#222222", "#888888"


@dataclass(frozen=True)
class _Curves:
    """One run's series, over the tokens that this run has seen."""

    title: str
    train: list[tuple[float, float]]
    valid: list[tuple[float, float]]
    tokens: float
    """Tokens of the whole run."""


def plot_loss_curves(
    output_dirs: Sequence[str | Path],
    destination: str | Path,
    titles: Sequence[str] | None = None,
    dense_cross_entropy: float | None = None,
) -> None:
    """Draw the runs of one model, stage after stage, into one PNG.

    Above, the held-out cross entropy over all tokens seen, one coloured band a stage. Below, each stage's
    training loss with its own axis, because an alignment error and a cross entropy have no common scale.

    Args:
        output_dirs: folders with a ``metrics.jsonl``, in the order of training.
        destination: the PNG; an existing one is replaced.
        titles: one per folder; folder names by default.
        dense_cross_entropy: of the dense source on the same held-out text, in nats per token: drawn as the
            line to reach.

    Raises:
        DataError: a folder has no metrics, or none that can be drawn.
        PlatformError: ``destination`` cannot be written.
    """
    # The Figure class draws without pyplot, so no display is asked for and no figure outlives this call.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    directories = [Path(directory) for directory in output_dirs]
    names = [directory.resolve().name for directory in directories] if titles is None else titles
    runs = [_read(directory, name) for directory, name in zip(directories, names, strict=True)]
    evaluated = any(run.valid for run in runs)
    trained = [run for run in runs if run.train]

    both = bool(evaluated and trained)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(8.4, 6.4 if both else 4.0), layout=layout)
    rows: Any = figure.subfigures(2, 1, height_ratios=[1.5, 1]) if both else [figure, figure]
    if evaluated:
        _draw_held_out(rows[0].subplots(), runs, dense_cross_entropy)
    if trained:
        panels = rows[1].subplots(1, len(trained), squeeze=False)[0]
        for panel, run in zip(panels, trained, strict=True):
            _draw_training(panel, run, _STAGE_COLOURS[runs.index(run) % len(_STAGE_COLOURS)])
    _save(figure, Path(destination))


def _read(directory: Path, title: str) -> _Curves:
    points = read_metrics(directory)
    counted = [point for point in points if point.get("train/tokens") and point["iteration"]]
    per_iteration = counted[-1]["train/tokens"] / counted[-1]["iteration"] if counted else 0.0

    def series(name: str) -> list[tuple[float, float]]:
        # Points without a value, or with one that was not finite, are left out.
        found = [(point["iteration"] * per_iteration, point.get(name)) for point in points]
        return [(tokens, value) for tokens, value in found if value is not None]

    train, valid = series("train/loss"), series("valid/cross_entropy")
    if not train and not valid:
        raise DataError(
            f"{directory / METRICS_FILE} has no finite train/loss or valid/cross_entropy to draw; "
            "train for at least logging.log_interval iterations."
        )
    return _Curves(title, train, valid, max(tokens for tokens, _ in train + valid))


def _draw_held_out(panel: Any, runs: Sequence[_Curves], dense_cross_entropy: float | None) -> None:
    start = 0.0
    for number, run in enumerate(runs):
        colour = _STAGE_COLOURS[number % len(_STAGE_COLOURS)]
        panel.axvspan(start, start + run.tokens, color=colour, alpha=0.08, linewidth=0)
        panel.annotate(
            run.title,
            (start + run.tokens / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            color=colour,
            fontweight="bold",
        )
        if run.valid:
            x, y = [start + tokens for tokens, _ in run.valid], [value for _, value in run.valid]
            panel.plot(x, y, color=colour, linewidth=2, marker="o", markersize=5, clip_on=False, zorder=3)
            # A later stage starts where the one before it ended: one label is enough there.
            shown = {0: number == 0, len(x) - 1: True}
            for index in sorted(index for index, wanted in shown.items() if wanted):
                # Above the part of the curve that follows, which is flatter than the one before.
                at_the_end = run is runs[-1] and index == len(x) - 1 and index > 0
                panel.annotate(
                    f"{y[index]:.2f}",
                    (x[index], y[index]),
                    xytext=(-2 if at_the_end else 6, 7),
                    textcoords="offset points",
                    ha="right" if at_the_end else "left",
                    color=_INK,
                    fontsize=11,
                    fontweight="bold",
                )
        start += run.tokens
    values = [value for run in runs for _, value in run.valid]
    lowest = min(values) if dense_cross_entropy is None else min(*values, dense_cross_entropy)
    margin = 0.16 * (max(values) - lowest) or 0.1
    panel.set(xlim=(0, start or 1), ylim=(lowest - margin, max(values) + 1.4 * margin))
    if dense_cross_entropy is not None:
        panel.axhline(dense_cross_entropy, color=_FAINT, linestyle=(0, (5, 3)), linewidth=1.2)
        panel.annotate(
            f"dense source {dense_cross_entropy:.2f}",
            (0.0, dense_cross_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(7, -4),
            textcoords="offset points",
            va="top",
            color=_FAINT,
        )
    panel.set_title("Held-out cross entropy", loc="left", fontweight="bold", color=_INK)
    _dress(panel, "nats per token")


def _draw_training(panel: Any, run: _Curves, colour: str) -> None:
    panel.plot(*zip(*run.train, strict=True), color=colour, linewidth=1.6, marker=".", markersize=4)
    panel.set_title(f"Training loss, {run.title}", loc="left", fontsize=10, color=_INK)
    panel.set_xlim(0, run.tokens or 1)
    _dress(panel, None)


def _dress(panel: Any, ylabel: str | None) -> None:
    from matplotlib.ticker import EngFormatter

    panel.set_xlabel("tokens", color=_FAINT)
    if ylabel is not None:
        panel.set_ylabel(ylabel, color=_FAINT)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(axis="y", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_FAINT)
    panel.tick_params(colors=_FAINT)


def _save(figure: Any, destination: Path) -> None:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replaced_durably(destination) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    except OSError as error:
        raise PlatformError(
            f"{destination} cannot be written ({error.strerror}); choose another file."
        ) from error
