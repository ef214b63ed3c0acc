"""What one rank holds of a run, as it lies there: for copies that the same rank takes up again.

Other than the sharded state of a checkpoint on the disk it is exchanged with nobody, needs no plan, and fits
the same topology alone. Data-parallel ranks each keep their weights, so that each can go on without the
others'.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.checkpoint.optimizer_state import STEPS, begin_state, chain_of
from spikingbrain_train.checkpoint.sharded_state import RunState, generator_states, restore_generators
from spikingbrain_train.errors import CheckpointError, first_line
from spikingbrain_train.parallel.process_groups import ProcessGroups

_MODEL, _GENERATORS = "model.", "generators."
_STEP = "step"
_PLAIN = {"iteration", "consumed_samples", "scheduler", "steps"}


def tensors_of(state: RunState, groups: ProcessGroups) -> dict[str, Tensor]:
    """Every tensor of this rank by name, none of them copied; weights are up to the last step."""
    return {
        **_learnt(state),
        **{f"{_GENERATORS}{name}": value for name, value in generator_states(groups).items()},
    }


def plain_state(state: RunState, groups: ProcessGroups) -> bytes:
    """Everything else, as ``torch.load(weights_only=True)`` reads it; callbacks' are the main process's."""
    values: dict[str, Any] = {
        "rank": groups.rank,
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "scheduler": state.scheduler.state_dict(),
        "steps": [[group.get(_STEP) for group in part.optimizer.param_groups] for part in _parts(state)],
    }
    of_callbacks = state.callbacks.state_dict()
    if groups.is_main_process:
        values["callbacks"] = of_callbacks
    content = BytesIO()
    torch.save(values, content)
    return content.getvalue()


def read_plain_state(content: bytes) -> dict[str, Any]:
    """What :func:`plain_state` has written; no collective.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        plain = torch.load(BytesIO(content), weights_only=True)
    except Exception as error:  # bytes that are something else fail in as many ways as there are formats
        raise CheckpointError(f"the state beside the tensors cannot be read ({first_line(error)})") from error
    if not isinstance(plain, dict) or (missing := sorted(_PLAIN - plain.keys())):
        what = "is no dictionary" if not isinstance(plain, dict) else f"lacks {missing[0]}"
        raise CheckpointError(f"the state beside the tensors {what}")
    return plain


def fill_from_rank(
    state: RunState, tensors: dict[str, Tensor], plain: dict[str, Any], groups: ProcessGroups
) -> None:
    """Give a run what :func:`tensors_of` and :func:`plain_state` took; a collective of all ranks.

    Args:
        state: of this run, built and still without a step.
        tensors: by name.
        plain: from :func:`read_plain_state`.
        groups: process groups.

    Raises:
        CheckpointError: on a rank whose own do not fit it, behind the collective.
    """
    of_callbacks: list[Any] = [plain.get("callbacks", {})]
    if groups.world_size > 1:
        torch.distributed.broadcast_object_list(of_callbacks, src=0)
    begin_state(state.optimizer)
    own = _learnt(state)
    generators = {name for name in tensors if name.startswith(_GENERATORS)}
    if differing := sorted(own.keys() ^ (tensors.keys() - generators)):
        raise CheckpointError(f"rank {groups.rank} keeps other tensors now, as {differing[0]}")
    for name, tensor in own.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"rank {groups.rank}: {name} has another shape or number format now")
    parts = _parts(state)
    if [len(steps) for steps in plain["steps"]] != [len(part.optimizer.param_groups) for part in parts]:
        raise CheckpointError(f"rank {groups.rank} keeps other groups of parameters now")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for part, steps in zip(parts, plain["steps"], strict=True):
        for group, step in zip(part.optimizer.param_groups, steps, strict=True):
            if step is not None:
                group[_STEP] = step
    state.scheduler.load_state_dict(plain["scheduler"])
    state.iteration, state.consumed_samples = plain["iteration"], plain["consumed_samples"]
    state.callbacks.load_state_dict(of_callbacks[0])
    restore_generators({name.removeprefix(_GENERATORS): tensors[name].clone() for name in generators}, groups)


def _learnt(state: RunState) -> dict[str, Tensor]:
    """Weights, main weights where they are numbers of their own, and what the optimizer knows of each."""
    model = state.model
    found: dict[str, Tensor] = {
        f"{_MODEL}{name}": value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not name.endswith("_extra_state")
    }
    live = {value.untyped_storage().data_ptr() for value in found.values()}
    for number, part in enumerate(_parts(state)):
        if STEPS in part.optimizer.state:
            found[f"optimizer.{number}.{STEPS}"] = part.optimizer.state[STEPS][_STEP]
        for n, group in enumerate(part.optimizer.param_groups):
            for m, parameter in enumerate(group["params"]):
                key = f"optimizer.{number}.{n}.{m}."
                if parameter.untyped_storage().data_ptr() not in live:
                    found[f"{key}param"] = parameter
                for name, value in part.optimizer.state[parameter].items():
                    if isinstance(value, Tensor):
                        found[f"{key}{name}"] = value
    return {name: value.detach() for name, value in found.items()}


def _parts(state: RunState) -> list[Any]:
    return chain_of(state.optimizer)
