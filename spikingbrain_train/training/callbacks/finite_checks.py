"""A held-out cross entropy that is no number ends a run; what to change of one whose numbers went wrong.

What becomes of batches is in bad_batches.py.
"""

from __future__ import annotations

import math
from pathlib import Path

from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, way_back
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class FiniteChecks(Callback):
    """Ends the run on all ranks where its held-out cross entropy is NaN or infinite."""

    def after_evaluation(self, report: Report) -> None:
        value = report.metrics.get("valid/cross_entropy")
        if value is not None and not math.isfinite(value):
            raise NumericalError(
                f"the held-out cross entropy became {value} at iteration {report.iteration}, so the run "
                f"stops before it spoils anything{advice(self.run.config, self.run.state.iteration)}"
            )


def advice(config: RunConfig, steps_done: int) -> str:
    """What to change of a run whose numbers went wrong, behind the sentence that says so.

    Args:
        config: the run, whose settings it is on.
        steps_done: the newest step that changed the weights; 0 where none has.
    """
    if steps_done == 0:  # no learning rate is at fault
        return f"; no step has changed the weights yet: {_way_to_begin(config)}."
    optimizer = config.optimizer
    return (
        f"; lower optimizer.lr (now {optimizer.lr}) or lengthen optimizer.lr_warmup_iters, and "
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
