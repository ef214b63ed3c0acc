"""When a run saves."""

from __future__ import annotations

from spikingbrain_train.training.callbacks.callback import Callback


class Checkpointing(Callback):
    """Saves every ``checkpoint.save_interval`` steps, after the last, and when the run is asked to stop."""

    def step_end(self) -> None:
        run = self.run
        interval = run.config.checkpoint.save_interval
        is_due = interval > 0 and run.state.iteration % interval == 0
        if run.is_last_step or run.stop_reason is not None or is_due:
            self._save()

    def _save(self) -> None:
        run = self.run
        run.callbacks.before_save()
        with run.activity("saving"):
            folder = run.checkpoints.save(run.state, run.record)
        run.say(f"saved {folder}")
        run.callbacks.after_save(folder)
