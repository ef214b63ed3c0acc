"""What the main process of a run says on its terminal or in its log; the others say nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from spikingbrain_train.reporting.activity import Activity
from spikingbrain_train.reporting.progress import ProgressPrinter
from spikingbrain_train.reporting.start_times import StartTimes
from spikingbrain_train.reporting.tables import facts, terminal_width
from spikingbrain_train.training.run_details import append_detail

_UNLIMITED = 1 << 20


class Console:
    """Lines and activities of a run.

    Args:
        total_iterations: optimizer steps of the stage.
        output_dir: folder of the run.
        is_main_process: whether this is the rank that speaks.
        start_times: of this process, to which activities before the first step are added.
    """

    def __init__(
        self,
        total_iterations: int,
        output_dir: str,
        *,
        is_main_process: bool,
        start_times: StartTimes | None = None,
    ) -> None:
        self.start_times = start_times or StartTimes(time.monotonic())
        self.progress = ProgressPrinter(total_iterations)
        self._output_dir = output_dir
        self._speaks = is_main_process

    def say(self, text: str) -> None:
        """Write a line."""
        if self._speaks:
            self.progress.message(text)

    def rows(self, rows: Sequence[tuple[str, str]], *, wrapped: bool = True) -> None:
        """Write names with what is to be said of each beside them; commands to copy are not wrapped."""
        for line in facts(rows, terminal_width() if wrapped else _UNLIMITED):
            self.say(line)

    def detail(self, line: str) -> None:
        """Write a line into run_details.txt, for those who look into a run."""
        if self._speaks:
            append_detail(self._output_dir, line)

    @contextmanager
    def activity(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Activity]:
        """Say that ``what`` still runs while the body does, and how much of ``total`` is done."""
        with self.start_times.part(what):
            if not self._speaks:
                yield Activity(None, what, total, unit)
                return
            with self.progress.status.activity(what, total, unit) as current:
                yield current
