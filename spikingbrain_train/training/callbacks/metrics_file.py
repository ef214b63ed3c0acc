"""Every point of a run as a line of ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, TextIO

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.reporting.metrics import METRICS_FILE, parse_point
from spikingbrain_train.storage.durable_files import write_text_durably
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report

_log = logging.getLogger(__name__)


class MetricsFile(Callback):
    """Appends reports to ``<output_dir>/metrics.jsonl``, a whole line at a time.

    A run that goes on from iteration N drops the points that an earlier attempt wrote beyond N; a new run
    drops all. In the file a NaN or infinity is ``null``, which any JSON reader takes.
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
            _drop_points_after(self._path, self.run.state.iteration)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from error

    def log(self, report: Report) -> None:
        """Write a line. Raises PlatformError where it cannot be written, for example on a full disk."""
        assert self._file is not None, "the run has not started, or has ended"
        point: dict[str, Any] = {"iteration": report.iteration, "time": round(time.time(), 3)}
        point.update({name: _finite(value) for name, value in report.metrics.items()})
        for name, table in report.heat_maps.items():
            point[name] = [[_finite(value, digits=4) for value in row] for row in table.rows]
        try:
            self._file.write(json.dumps(point) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

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

    def _cannot_write(self, error: OSError) -> PlatformError:
        reason = error.strerror
        return PlatformError(
            f"{self._path} cannot be written ({reason}); choose another output_dir or make room there."
        )


def _finite(value: float, digits: int | None = None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def _drop_points_after(path: Path, iteration: int) -> None:
    """Keep the points up to ``iteration`` (none for a new run) and drop lines that a crash damaged."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        point = parse_point(line)
        if point is None:
            # A damaged log line is no reason to refuse to go on training.
            _log.warning("%s, line %d is not a metrics point; it is dropped", path, number)
        elif iteration > 0 and point["iteration"] <= iteration:
            kept.append(line + "\n")
    write_text_durably(path, "".join(kept))
