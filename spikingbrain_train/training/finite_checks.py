"""NaN and infinity stop a run before they reach the weights."""

from __future__ import annotations

import math
from pathlib import Path

from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, way_back


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
