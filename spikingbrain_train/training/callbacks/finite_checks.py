"""NaN and infinity stop a run before they reach the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, way_back
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report
from spikingbrain_train.training.stages.losses import FINE, StepLosses

if TYPE_CHECKING:
    from torch import Tensor


class FiniteChecks(Callback):
    """Ends the run on all ranks where loss, gradient norm or held-out cross entropy is NaN or infinite."""

    def vote(self, losses: StepLosses) -> Tensor:
        self._losses = losses
        return losses.standing

    def agreed(self, number: int) -> None:
        losses = self._losses
        del self._losses
        if number != FINE:
            self._require_finite(losses.reduced()["train/loss"], "loss", self._step)

    def before_update(self, grad_norm: float) -> None:
        self._require_finite(grad_norm, "gradient norm", self._step)

    def after_evaluation(self, report: Report) -> None:
        if (value := report.metrics.get("valid/cross_entropy")) is not None:
            self._require_finite(value, "held-out cross entropy", report.iteration)

    @property
    def _step(self) -> int:
        """The step that is under way, counted from 1."""
        return self.run.state.iteration + 1

    def _require_finite(self, value: float, what: str, iteration: int) -> None:
        require_finite(value, what, iteration, self.run.state.iteration, self.run.config)


def require_finite(value: float, what: str, iteration: int, steps_done: int, config: RunConfig) -> None:
    """Raise :class:`NumericalError` where a number that every rank has is NaN or infinite.

    Args:
        value: the same on every rank, so that all of them stop.
        what: its name, for the message.
        iteration: the optimizer step that it belongs to.
        steps_done: updates that the weights have had, on which the advice depends.
        config: the run, whose settings the advice is on.
    """
    if math.isfinite(value):
        return
    reason = f"the {what} became {value} at iteration {iteration}, so the run stops before it spoils anything"
    if steps_done == 0:  # no learning rate is at fault
        raise NumericalError(f"{reason}; no step has changed the weights yet: {_way_to_begin(config)}.")
    optimizer = config.optimizer
    raise NumericalError(
        f"{reason}; lower optimizer.lr (now {optimizer.lr}) or lengthen optimizer.lr_warmup_iters, and "
        f"{way_back(Path(config.output_dir) / CHECKPOINT_FOLDER)}."
    )


def _way_to_begin(config: RunConfig) -> str:
    """What to change of a run whose first forward or backward pass already is not finite."""
    load = config.checkpoint.load
    start = "name weights as checkpoint.load"
    if load is not None:
        start = f"name other weights as checkpoint.load (now {load})"
    if config.precision is Precision.fp32:
        return start
    return f"{start}, or compute in precision=fp32 (now {config.precision.value})"
