"""What the main process of a run says on its terminal or in its log; the others say nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from spikingbrain_train.reporting.activity import Activity
from spikingbrain_train.reporting.progress import ProgressPrinter


class Console:
    """Lines and activities of a run.

    Args:
        total_iterations: optimizer steps of the stage.
        is_main_process: whether this is the rank that speaks.
    """

    def __init__(self, total_iterations: int, *, is_main_process: bool) -> None:
        self.progress = ProgressPrinter(total_iterations)
        self._speaks = is_main_process

    def say(self, text: str) -> None:
        """Write a line."""
        if self._speaks:
            self.progress.message(text)

    def activity(
        self, what: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Activity]:
        """Say that ``what`` still runs while the body does, and how much of ``total`` is done."""
        if self._speaks:
            return self.progress.status.activity(what, total, unit)
        return nullcontext(Activity(None, what, total, unit))
