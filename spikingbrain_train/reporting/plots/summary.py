"""What the terminal says of a picture: a line per run, what a comparison ended at, and where runs went on."""

from __future__ import annotations

import math

from spikingbrain_train.errors import DataError
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.reporting.plots.cross_entropies import HELD_OUT, LOSS, final_values
from spikingbrain_train.reporting.plots.marks import continuations
from spikingbrain_train.reporting.plots.recording import Axis
from spikingbrain_train.reporting.plots.rows import Row, Run
from spikingbrain_train.reporting.plots.style import count_text
from spikingbrain_train.reporting.tables import aligned


def summary(row: Row) -> list[str]:
    """Lines about the runs of a picture, in its order."""
    lines = _table(row) if row.is_comparison else [_line(run) for run in row.runs]
    for each in continuations(row):
        if each.changes:
            lines.append(f"{each.run.name}, from iteration {each.iteration}: {', '.join(each.changes)}")
    return lines


def _line(run: Run) -> str:
    recording = run.recording
    parts = [f"{recording.stage} stage" if recording.stage else "run", f"{recording.iterations:,} steps"]
    if (tokens := _end(run, Axis.tokens)) is not None:
        parts.append(f"{count_text(tokens)} tokens")
    if (hours := _end(run, Axis.hours)) is not None:
        parts.append(format_duration(3600 * hours))
    held_out = [y for _, y in run.series(HELD_OUT) if math.isfinite(y)] if run.has(HELD_OUT) else []
    finals = final_values(run)
    if len(held_out) > 1:
        parts.append(f"held-out cross entropy {held_out[0]:.3f} → {held_out[-1]:.3f}")
        finals.pop("held-out", None)
    parts += [f"{words} {value:.3f}" for words, value in finals.items()]
    if run.until is not None:
        parts.append(f"drawn up to iteration {run.until}, from which the next run started")
    if gaps := _gaps(run):
        parts.append(f"{gaps} points without a number")
    return f"{run.name}: {', '.join(parts)}"


def _table(row: Row) -> list[str]:
    """What each run of a comparison took and ended at, in columns."""
    finals = [final_values(run) for run in row.runs]
    words = list(dict.fromkeys(word for each in finals for word in each))
    lines = [["run", "steps", "tokens", "time", *words]]
    for run, values in zip(row.runs, finals, strict=True):
        tokens, hours = _end(run, Axis.tokens), _end(run, Axis.hours)
        lines.append(
            [
                run.name,
                f"{run.recording.iterations:,}",
                "" if tokens is None else count_text(tokens),
                "" if hours is None else format_duration(3600 * hours),
                *(f"{values[word]:.4f}" if word in values else "" for word in words),
            ]
        )
    return aligned(lines, left=1)


def _end(run: Run, axis: Axis) -> float | None:
    """Where a run's last point lies, None where it does not say."""
    try:
        return run.recording.end(axis)
    except DataError:
        return None


def _gaps(run: Run) -> int:
    """Reports of a loss that was no number."""
    return sum(not math.isfinite(y) for _, y in run.series(LOSS))
