"""When a run keeps copies of its state in memory."""

from __future__ import annotations

from spikingbrain_train.training.callbacks.callback import Callback, SkipUpdate


class MemoryCheckpointing(Callback):
    """Keeps a copy every ``checkpoint.memory_interval`` steps, and lets them go when the run has ended well.

    What is due behind a step that updated nothing is put off until one does.
    """

    _is_skipped = False
    _is_overdue = False

    def step_begin(self) -> None:
        self._is_skipped = False

    def update_skipped(self, skipped: SkipUpdate) -> None:
        self._is_skipped = True

    def step_end(self) -> None:
        run = self.run
        memory, interval = run.checkpoints.memory, run.config.checkpoint.memory_interval
        if memory is None:
            return
        if run.state.iteration % interval == 0:
            self._is_overdue = True
        ends = run.is_last_step or run.stop_reason is not None
        if not self._is_overdue or self._is_skipped or ends:
            return
        self._is_overdue = False
        with run.activity("keeping a copy in memory"):
            memory.keep(run.state, run.record, run.checkpoints.newest_on_disk)

    def end(self, error: BaseException | None) -> None:
        if self.run.checkpoints.memory is not None:
            self.run.checkpoints.memory.end(is_saved=error is None)
