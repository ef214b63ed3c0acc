"""NaN and infinity stop a run before they reach the weights, and never reach a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.ops.finite import first_not_finite
from spikingbrain_train.parallel.agreement import first_failure
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, iteration_folder, latest_iteration


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


def way_back(checkpoints: Path) -> str:
    """What a run that diverged goes on from."""
    newest = latest_iteration(checkpoints)
    if newest is None:
        return "start again (this run has saved no checkpoint)"
    return f"go on from {iteration_folder(checkpoints, newest)}"


def first_not_finite_of_run(
    model: torch.nn.Module, optimizer: MegatronOptimizer, groups: ProcessGroups
) -> str | None:
    """Where any rank holds a NaN or an infinity among weights, main weights and optimizer moments, None where
    none does; a collective of all ranks.

    Args:
        model: this rank's pipeline stage, its weights gathered.
        optimizer: its optimizer.
        groups: process groups.
    """
    return first_failure(first_not_finite(_state(model, optimizer)), groups)


def _state(model: torch.nn.Module, optimizer: MegatronOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield "an fp32 main weight of the optimizer", parameter
                for name, value in part.optimizer.state[parameter].items():
                    if torch.is_tensor(value):
                        yield f"{name} of the optimizer", value
