"""Alerts of a run's own course: it goes on after a stop, is done, was asked to stop, or has failed."""

from __future__ import annotations

from spikingbrain_train.errors import NumericalError
from spikingbrain_train.training.alert import Alert, Level
from spikingbrain_train.training.callbacks.callback import Callback


class Milestones(Callback):
    """Tells who does not watch where a run begins again and how it ends."""

    def start(self) -> None:
        run = self.run
        if not run.beginning.is_start and not run.is_last_step:
            where = f"{run.config.output_dir} goes on at iteration {run.state.iteration}"
            self._alert("run resumed", where, Level.info)

    def end(self, error: BaseException | None) -> None:
        run = self.run
        where = f"{run.config.output_dir}, after iteration {run.state.iteration}"
        if isinstance(error, NumericalError):
            self._alert("run diverged", f"{where}: {error}", Level.error)
        elif error is not None:
            self._alert("run failed", f"{where}: {type(error).__name__}: {error}", Level.error)
        elif run.is_last_step:
            self._alert("run finished", where, Level.info)
        else:
            self._alert("run stopped", f"{where}: {run.stop_reason}; start it again to go on", Level.warning)

    def _alert(self, title: str, text: str, level: Level) -> None:
        self.run.callbacks.alert(Alert(title, text, level))
