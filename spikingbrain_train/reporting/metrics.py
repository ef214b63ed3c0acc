"""What a run has written to its file of JSON lines: points of its curves, and what happened between them.

Metric names are ``group/name``; docs/metrics.md has all of them. An event line says with ``event`` that the
run started or went on there, on which data and with which changes of settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError

METRICS_FILE = "metrics.jsonl"
STARTED, RESUMED = "started", "resumed"
"""Kinds of events."""


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The points of a run's metrics file, in the order they were written.

    A last line that a crash cut short is left out.

    Raises:
        DataError: there is no metrics file, or a line inside it is not a JSON object with an iteration.
    """
    return [line for line in read_lines(output_dir) if not is_event(line)]


def read_events(output_dir: str | Path) -> list[dict[str, Any]]:
    """The starts and continuations of a run, in their order; files of earlier releases have none.

    Each has ``iteration`` (steps done before), ``time`` (seconds since 1970), ``event`` (``started`` or
    ``resumed``), ``run`` (:class:`~spikingbrain_train.training.beginning.Facts`) and, where it went on,
    ``changed``: setting -> [in the checkpoint, now].

    Raises:
        DataError: as :func:`read_metrics`.
    """
    return [line for line in read_lines(output_dir) if is_event(line)]


def is_event(line: dict[str, Any]) -> bool:
    """Whether a line of the file is an event, and no point."""
    return "event" in line


def parse_line(line: str) -> dict[str, Any] | None:
    """The point or event of a line, None where the line is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("iteration"), int) else None


def read_lines(output_dir: str | Path) -> list[dict[str, Any]]:
    """Points and events in the order they were written; otherwise as :func:`read_metrics`."""
    path = Path(output_dir) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist{_near_runs(Path(output_dir))}; name the output_dir of a run that has "
            "logged metrics"
        ) from error
    except NotADirectoryError as error:
        raise DataError(f"{output_dir} is a file; name the output_dir of the run, a folder") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text, so no run wrote it; name the output_dir of another") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name the output_dir of a run") from error
    *complete, _unfinished = lines
    found = []
    for number, line in enumerate(complete, start=1):
        parsed = parse_line(line)
        if parsed is None:
            raise DataError(f"{path}, line {number} is not a metrics point; remove that line.")
        found.append(parsed)
    return found


def _near_runs(folder: Path) -> str:
    """Which folders around one without metrics have some, as the middle of a sentence."""
    runs = [str(path.parent) for path in sorted(folder.glob(f"*/{METRICS_FILE}"))]
    if not runs and (folder.parent / METRICS_FILE).is_file():
        runs = [str(folder.parent)]
    if not runs:
        return ""
    shown, more = runs[:4], len(runs) - 4
    return f", but there is one in {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")
