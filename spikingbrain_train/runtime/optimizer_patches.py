"""What is changed of one optimizer of megatron-core, once it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spikingbrain_train.runtime.patch import Moment, Patch

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer


def keep_step_when_loading(optimizer: DistributedOptimizer) -> None:
    """Make the distributed optimizer restore torch's AdamW.

    megatron-core first gives all parameters one step tensor, which the optimizer would then advance once for
    each of them, and then copies every state tensor from the checkpoint, where a step for each parameter is
    not. So each parameter gets a step of its own and keeps it.
    """
    copy_states = optimizer._set_main_param_and_optimizer_states

    def copy_states_but_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        copy_states(model_param, {"step": state["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = copy_states_but_step


@contextmanager
def checked_gradient_norm(
    optimizer: ChainedOptimizer, check: Callable[[float], None]
) -> Iterator[list[float]]:
    """Within, a step of the optimizer tells ``check`` the gradient norm before it changes anything.

    Args:
        optimizer: its gradients are ready.
        check: called with the norm, which is the same on every rank; what it raises ends the step.

    Returns:
        A list that gets the norm.
    """
    norms: list[float] = []
    whole_norm = type(optimizer).get_grad_norm

    def checked_norm() -> float:
        norms.append(float(whole_norm(optimizer) or 0.0))
        check(norms[0])
        return norms[0]

    optimizer.get_grad_norm = checked_norm
    try:
        yield norms
    finally:
        del optimizer.get_grad_norm


@contextmanager
def stored_by(
    optimizer: DistributedOptimizer,
    state: Callable[[DistributedOptimizer, dict[str, Any]], dict[int, dict[str, Any]]],
) -> Iterator[None]:
    """Within, ``state`` says what a ``fully_reshardable`` checkpoint stores or reads of the optimizer.

    Args:
        optimizer: of this rank.
        state: of the optimizer and the model's sharded state: number of a parameter -> name of a state ->
            sharded tensors.
    """

    def own_state(weights: dict[str, Any], is_loading: bool, metadata: dict[str, Any]) -> dict[int, Any]:
        return state(optimizer, weights)

    optimizer.sharded_param_state_fully_reshardable = own_state
    try:
        yield
    finally:
        del optimizer.sharded_param_state_fully_reshardable


PATCHES = (
    Patch(
        name="keep_step_when_loading",
        changes="DistributedOptimizer._set_main_param_and_optimizer_states of an optimizer on torch's AdamW",
        reason="all parameters would share one step, which each of them advances, and loading would look for "
        "steps in the checkpoint, where they are not",
        apply=keep_step_when_loading,
        moment=Moment.using,
    ),
    Patch(
        name="checked_gradient_norm",
        changes="ChainedOptimizer.get_grad_norm of the optimizer, for a step",
        reason="megatron-core updates the weights whatever the norm is, which may not be finite",
        apply=checked_gradient_norm,
        moment=Moment.using,
    ),
    Patch(
        name="stored_by",
        changes="DistributedOptimizer.sharded_param_state_fully_reshardable of the optimizer, for a save or "
        "a load",
        reason="every rank would gather the whole state while steps stand still, 12 bytes a parameter, and "
        "what lies behind the padding of a bucket would be stored too late by it; and every rank would read "
        "AdamW's moments of all parameters, also of those that have none or lie on others",
        apply=stored_by,
        moment=Moment.using,
    ),
)
