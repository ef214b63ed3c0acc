"""Every point of a run, and every start of it, as a line of ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, TextIO

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.reporting.metrics import METRICS_FILE, STARTED, is_event, parse_line
from spikingbrain_train.storage.durable_files import write_text_durably
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report

_log = logging.getLogger(__name__)


class MetricsFile(Callback):
    """Appends reports to ``<output_dir>/metrics.jsonl``, a whole line at a time.

    A run that goes on from iteration N drops the points that an earlier attempt wrote beyond N, and what it
    said of attempts of which no point is left; a new run drops all. Where the run begins, a line says on what
    and with which changes (docs/metrics.md). A NaN or infinity is ``null``, which any JSON reader takes.
    """

    _file: TextIO | None = None
    """None before the start, after the end, and on ranks that do not log."""

    def start(self) -> None:
        """Open the file. Raises PlatformError where output_dir cannot be written."""
        self._path = Path(self.run.config.output_dir) / METRICS_FILE
        if not self.run.groups.is_main_process:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, self.run.state.iteration)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from error
        if self.run.beginning.is_start or not self.run.is_last_step:  # else nothing follows
            self._write(self.run.beginning.event())

    def log(self, report: Report) -> None:
        """Write a line. Raises PlatformError where it cannot be written, for example on a full disk."""
        point: dict[str, Any] = {"iteration": report.iteration}
        point.update({name: _finite(value) for name, value in report.metrics.items()})
        for name, table in report.heat_maps.items():
            point[name] = [[_finite(value, digits=4) for value in row] for row in table.rows]
        self._write(point)

    def end(self, error: BaseException | None) -> None:
        """Close the file. Raises PlatformError where it cannot be written and nothing else is under way."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()  # tries once more what a full disk kept from being written
        except OSError as met:
            failure = self._cannot_write(met)
            if error is None:
                raise failure from met
            _log.warning("%s", failure)  # what ends the run is the error that is under way

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "the run has not started, or has ended"
        timed = {"iteration": line["iteration"], "time": round(time.time(), 3)} | line
        try:
            self._file.write(json.dumps(timed) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> PlatformError:
        reason = error.strerror
        return PlatformError(
            f"{self._path} cannot be written ({reason}); choose another output_dir or make room there."
        )


def _finite(value: float, digits: int | None = None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def _drop_lines_after(path: Path, iteration: int) -> None:
    """Keep what holds of a run that goes on from ``iteration``, nothing of a new one, and no damaged line."""
    if not path.exists():
        return
    kept = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = parse_line(text)
        if line is None:
            # A damaged log line is no reason to refuse to go on training.
            _log.warning("%s, line %d is not a metrics point; it is dropped", path, number)
        elif iteration > 0 and _holds(line, iteration):
            kept.append(text + "\n")
    write_text_durably(path, "".join(kept))


def _holds(line: dict[str, Any], iteration: int) -> bool:
    """Whether a line is of the steps up to ``iteration``; an event is of those behind it, a start of all."""
    if is_event(line) and line["event"] != STARTED:
        return bool(line["iteration"] < iteration)
    return bool(line["iteration"] <= iteration)
