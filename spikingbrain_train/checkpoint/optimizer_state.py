"""The optimizer's part of a checkpoint: moments and fp32 weights of every parameter, and the number of steps.

megatron-core also stores the parameter groups: their rates, betas, eps and weight decay. On loading it looks
for a stored group of the same settings and takes all of them over, so that a changed setting is either
ignored (a rate, a beta) or not found (a multiplier; in 0.19 also a rate). Here a run keeps its own groups and
takes only the step count from those stored: tensors are found by the names of their parameters, whatever
groups those were in. What the groups say is compared before, in planning/resume.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

STEPS = "steps"
"""Key of the state of AdamW on a rank without parameters (see :func:`count_steps`)."""
_COMMON_STEP = "common_step"
_MAIN_PARAMS = "fp32_from_fp16_params"
_MAIN_PARAMS_BY_POSITION = "main_params_by_position"


def chain_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that it is made of: experts have one of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _parts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Each optimizer of a chain with its part of ``state``."""
    chain = chain_of(optimizer)
    return [(chain[0], state)] if len(chain) == 1 else [(part, state[n]) for n, part in enumerate(chain)]


def count_steps(inner: Any) -> None:
    """Have torch's AdamW of a rank without parameters know how many steps it has taken.

    AdamW counts in the state of its parameters, and a checkpoint takes the number of the first rank, which
    may have none: no experts in its layers, or none that train.
    """
    inner.state[STEPS] = {"step": torch.zeros((), dtype=torch.float32)}

    def count(*_: Any) -> None:
        inner.state[STEPS]["step"] += 1

    inner.register_step_post_hook(count)


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped the state that a checkpoint stores: no moments, and no steps."""
    for part in chain_of(optimizer):
        inner = part.optimizer
        part.init_state_fn(inner, part.config)
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state.setdefault("step", torch.tensor(0.0))
        else:  # Transformer Engine's and Apex's count in their groups
            for group in inner.param_groups:
                group.setdefault("step", 0)


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """Where the state of torch's optimizer lies: megatron-core's mixed-precision forms wrap it."""
    inner: dict[str, Any] = state.get("optimizer", state)
    return inner


def _steps(stored: dict[str, Any]) -> int:
    """How many an optimizer has taken: its groups or its state say it, if it has taken any."""
    # Transformer Engine's does not count in empty groups.
    in_groups = [group["step"] for group in stored["param_groups"] if group.get("step") is not None]
    return int(max(in_groups, default=stored.get("state", {}).get(_COMMON_STEP, 0)))


def state_to_load(
    optimizer: MegatronOptimizer, weights: dict[str, Any], metadata: dict[str, Any]
) -> dict[Any, Any]:
    """What to read from a checkpoint that any optimizer settings wrote.

    Args:
        optimizer: this run's, already built.
        weights: the model's sharded state.
        metadata: megatron-core's sharding options.

    Returns:
        Sharded tensors under keys of :func:`load_state`'s own; nothing that depends on parameter groups of
        the checkpoint.
    """
    sharded = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
    for _, state in _parts(optimizer, sharded):
        _inner(state).pop("param_groups")
        # Lists would be held against those of the checkpoint, group by group; a dict has no length to differ
        # in, and an empty group (of a rank without such parameters) keeps its position.
        groups = state.pop(_MAIN_PARAMS, None)
        if groups is not None:
            state[_MAIN_PARAMS_BY_POSITION] = {n: dict(enumerate(group)) for n, group in enumerate(groups)}
    return sharded


def load_state(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Give ``optimizer`` the tensors and steps of a checkpoint; its settings stay.

    Args:
        optimizer: this run's.
        loaded: what was read for :func:`state_to_load`.
    """
    for part, state in _parts(optimizer, loaded):
        stored, own = _inner(state), part.optimizer.state_dict()["param_groups"]
        steps = _steps(stored)
        # Transformer Engine's and Apex's AdamW count in their groups, torch's for every parameter; of the
        # latter's in the distributed optimizer megatron-core stores it in groups, too.
        counts_in_groups = not isinstance(part.optimizer, torch.optim.Adam)
        in_groups = counts_in_groups or "state" not in stored
        stored["param_groups"] = [
            {**group, "step": steps} if in_groups or "step" in group else group for group in own
        ]
        if counts_in_groups:
            stored.get("state", {}).pop(_COMMON_STEP, None)
        elif "state" in stored:
            stored["state"][_COMMON_STEP] = torch.tensor(float(steps))
        if "state" in stored:  # beside tensors, it came from a rank that may have had parameters or not
            stored["state"].pop(STEPS, None)
            if STEPS in part.optimizer.state:
                stored["state"][STEPS] = {}
        if hasattr(part, "fp32_from_float16_groups"):
            by_position = state.pop(_MAIN_PARAMS_BY_POSITION, {})
            state[_MAIN_PARAMS] = [
                [by_position[n][position] for position in range(len(group))]
                for n, group in enumerate(part.fp32_from_float16_groups)
            ]
    optimizer.load_state_dict(loaded)
