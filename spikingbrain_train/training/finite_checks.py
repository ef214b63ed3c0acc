"""NaN and infinity stop a run before they reach the weights, and never reach a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from spikingbrain_train.config.checkpoint_folder import iteration_folder, latest_iteration
from spikingbrain_train.config.errors import NumericalError
from spikingbrain_train.config.run import OptimizerConfig
from spikingbrain_train.ops.finite import first_not_finite
from spikingbrain_train.parallel.agreement import first_failure
from spikingbrain_train.parallel.process_groups import ProcessGroups


def require_finite(
    value: float, what: str, iteration: int, optimizer: OptimizerConfig, checkpoints: Path
) -> None:
    """Raise :class:`NumericalError` where a number that every rank has is NaN or infinite.

    Args:
        value: the same on every rank, so that all of them stop.
        what: its name, for the message.
        iteration: the optimizer step that it belongs to.
        optimizer: settings that the message gives advice on.
        checkpoints: checkpoint folder of the run.
    """
    if math.isfinite(value):
        return
    raise NumericalError(
        f"the {what} became {value} at iteration {iteration}, so the run stops before it spoils anything; "
        f"lower optimizer.lr (now {optimizer.lr}) or lengthen optimizer.lr_warmup_iters, and "
        f"{way_back(checkpoints)}."
    )


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
