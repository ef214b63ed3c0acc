"""When a run saves, and how far what it saves has come."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from spikingbrain_train.config.run import WhileSaving
from spikingbrain_train.errors import NumericalError, SpikingBrainError
from spikingbrain_train.training.callbacks.callback import Callback, SkipUpdate

if TYPE_CHECKING:
    from pathlib import Path

    from spikingbrain_train.training.stages.losses import StepLosses


class Checkpointing(Callback):
    """Saves every ``checkpoint.save_interval`` steps, after the last, and when the run is asked to stop.

    With ``checkpoint.async_save`` steps go on while a checkpoint is written. Once a step all ranks agree
    whether any is still busy with it, in the reduction that takes the other votes, too.

    What is due behind a step that updated nothing is put off until one does: the newest checkpoint stays one
    from before the trouble, to which weights may have to go back.
    """

    _is_skipped = False
    _is_overdue = False

    def vote(self, losses: StepLosses) -> int:
        return int(self.run.checkpoints.is_working())

    def agreed(self, number: int) -> None:
        if self.run.checkpoints.pending is not None and not number:
            self._tell(self.run.checkpoints.advance())

    def step_begin(self) -> None:
        self._is_skipped = False

    def update_skipped(self, skipped: SkipUpdate) -> None:
        self._is_skipped = True

    def step_end(self) -> None:
        run = self.run
        ends = run.is_last_step or run.stop_reason is not None
        interval = run.config.checkpoint.save_interval
        if interval > 0 and run.state.iteration % interval == 0:
            self._is_overdue = True
        if ends or (self._is_overdue and not self._is_skipped):
            self._is_overdue = False
            self._save(ends)

    def end(self, error: BaseException | None) -> None:
        """What was written before the numbers went wrong is good, and all ranks are here to finish it."""
        if isinstance(error, NumericalError) and self.run.checkpoints.pending is not None:
            with suppress(SpikingBrainError):  # which has been said already
                self._wait()

    def _save(self, ends: bool) -> None:
        run, checkpoint = self.run, self.run.config.checkpoint
        pending = run.checkpoints.pending
        if pending is not None and checkpoint.while_saving is WhileSaving.skip and not ends:
            run.say(f"iteration {run.state.iteration} is not saved: {pending} is still being written")
            return
        run.callbacks.before_save()
        if pending is not None:
            self._wait()
        with run.activity("saving"):
            run.checkpoints.begin(run.state, run.record)
            folder = run.checkpoints.wait() if ends or not checkpoint.async_save else None
        run.callbacks.after_snapshot()
        self._tell(folder)

    def _wait(self) -> None:
        with self.run.activity(f"waiting for the checkpoint of iteration {self.run.checkpoints.pending}"):
            folder = self.run.checkpoints.wait()
        self._tell(folder)

    def _tell(self, folder: Path | None) -> None:
        if folder is not None:
            self.run.say(f"saved {folder}")
            self.run.callbacks.after_save(folder)
