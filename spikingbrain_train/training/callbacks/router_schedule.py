"""What routers change by themselves after every step: biases that let new experts in."""

from __future__ import annotations

from spikingbrain_train.models.feed_forwards.routing import FollowsSteps
from spikingbrain_train.training.callbacks.callback import Callback


class RouterSchedule(Callback):
    """Tells routers of every step that updated the weights.

    What they change is stored with the weights: a run that goes on, or back to a checkpoint, has it
    as it was.
    """

    def start(self) -> None:
        self._routers = [each for each in self.run.state.model.modules() if isinstance(each, FollowsSteps)]
        self._before = self.run.state.iteration

    def step_begin(self) -> None:
        self._before = self.run.state.iteration

    def step_end(self) -> None:
        if self.run.state.iteration == self._before + 1:  # else the update was skipped
            for router in self._routers:
                router.step_done(self.run.state.iteration)
