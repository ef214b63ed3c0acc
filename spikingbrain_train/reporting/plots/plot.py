"""From folders of runs to a picture: everything is checked before matplotlib is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikingbrain_train.reporting.plots.formats import format_of
from spikingbrain_train.reporting.plots.panels import views_of
from spikingbrain_train.reporting.plots.picture import save_picture
from spikingbrain_train.reporting.plots.recording import Axis, Recording
from spikingbrain_train.reporting.plots.rows import arrange
from spikingbrain_train.reporting.plots.summary import summary
from spikingbrain_train.reporting.plots.views import Options


def plot_runs(
    output_dirs: Sequence[str | Path],
    destination: str | Path,
    *,
    axis: Axis = Axis.tokens,
    compare: bool = False,
    names: Sequence[str] | None = None,
    panels: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    options: Options | None = None,
) -> list[str]:
    """Draw one run, the stages of one model end to end, or runs on one axis.

    Args:
        output_dirs: folders with a ``metrics.jsonl``, in any order.
        destination: the picture, .png, .svg or .pdf; an existing one is replaced.
        axis: what curves are drawn over.
        compare: draw all runs from 0.
        names: one per folder; by default the settings in which compared runs differ, or their folders.
        panels: names of panels, None for those of which there is something to see.
        metrics: further metrics, by their names.
        options: how values are drawn; a dense line that was not measured on the runs' held-out text is left
            out.

    Returns:
        Lines for a terminal: what each run ended at, and what was left out.

    Raises:
        DataError: a folder has no metrics, or none that can be drawn.
        ConfigurationError: the runs do not follow each other and are not compared; a panel, metric, name or
            ending that does not fit.
        PlatformError: ``destination`` cannot be written.
    """
    destination, options = Path(destination), options or Options()
    format_of(destination)
    recordings = [Recording.read(folder) for folder in output_dirs]
    row = arrange(recordings, axis, compare=compare, names=names)
    notes = []
    if options.dense is not None and (reason := options.dense.reason_against(recordings)) is not None:
        notes.append(reason)
        options = replace(options, dense=None)
    views = views_of(row, panels, metrics, options)
    save_picture(row, views, options, destination)
    return [*summary(row), *notes]
