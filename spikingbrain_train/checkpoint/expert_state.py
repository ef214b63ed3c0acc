"""How the optimizer's part of a checkpoint holds experts, where some of a layer train alone.

Weights of all experts of a layer are one tensor of a checkpoint. Where only some train there is state of
these alone, which fills a tensor of as many, in the order of their numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.trained_weights import trained_experts
from spikingbrain_train.config.model import ModelConfig


def weights_with_state(weights: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The model's sharded state, as the optimizer is to lay its own out after.

    Args:
        weights: of the model.
        model: the network.
    """
    experts = trained_experts(model)
    if not experts:
        return weights
    routed = {
        weight.name
        for _, weight in model_weights(model)
        if weight.copies is not None and weight.copies.routed
    }

    def among_the_trained(sharded: ShardedTensor) -> ShardedTensor:
        number, *rest = sharded.global_offset
        if number not in experts:  # frozen: the optimizer does not ask
            return sharded
        fragments = sharded.axis_fragmentations
        return replace(
            sharded,
            global_shape=(len(experts), *sharded.global_shape[1:]),
            global_offset=(experts.index(number), *rest),
            axis_fragmentations=None if fragments is None else (len(experts), *fragments[1:]),
        )

    def changed(value: Any) -> Any:
        if isinstance(value, ShardedTensor) and value.key in routed:
            return among_the_trained(value)
        if isinstance(value, ShardedTensorFactory) and value.key in routed:
            build = value.build_fn

            def build_among_the_trained(*arguments: Any) -> Any:
                return dict_list_map_outplace(among_the_trained, build(*arguments))

            return replace(value, build_fn=build_among_the_trained)
        return value

    found: dict[str, Any] = dict_list_map_outplace(changed, weights)
    return found
