"""NaN and infinity never reach a checkpoint, and no run goes on from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from spikingbrain_train.checkpoint.optimizer_state import chain_of
from spikingbrain_train.ops.finite import first_not_finite
from spikingbrain_train.parallel.agreement import first_failure
from spikingbrain_train.parallel.own_part import own_part
from spikingbrain_train.parallel.process_groups import ProcessGroups


def first_not_finite_of_run(model: Any, optimizer: MegatronOptimizer, groups: ProcessGroups) -> str | None:
    """Where any rank holds a NaN or an infinity, None where none does; a collective of all ranks.

    Looked at are weights, main weights and optimizer moments.

    Args:
        model: this rank's pipeline stage, a module with its weights gathered.
        optimizer: its optimizer.
        groups: process groups.
    """
    return first_failure(first_not_finite(_state(model, optimizer)), groups)


def _state(model: torch.nn.Module, optimizer: MegatronOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, own_part(parameter)
    for part in chain_of(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield "an fp32 main weight of the optimizer", parameter
                for name, value in part.optimizer.state[parameter].items():
                    if torch.is_tensor(value):
                        yield f"{name} of the optimizer", value
