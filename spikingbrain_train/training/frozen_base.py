"""Models of which a part trains alone, adapters or some experts: how adapters begin, what is frozen."""

from __future__ import annotations

import torch

from spikingbrain_train.architecture.initializers import Uniform
from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.linear_transforms import may_begin_anew, trains
from spikingbrain_train.architecture.trained_weights import trained_experts, trains_in_part
from spikingbrain_train.checkpoint.sharded_state import sharded_weights
from spikingbrain_train.models.feed_forwards.routing import HoldsExperts
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.ops.seeds import generator


@torch.no_grad()
def begin_new_weights(model: HybridGPTModel | ModelChunks, seed: int) -> None:
    """Fill what a checkpoint of the base need not have, as its description says.

    The numbers depend on the seed and the parameter's name alone, not on how ranks share it.

    Args:
        model: this rank's stages.
        seed: of the run.
    """
    new = {
        weight.name: weight.init
        for _, weight in model_weights(model.model_config)
        if may_begin_anew(weight.name)
    }
    if not new:
        return
    for shard in sharded_weights(model).values():
        if shard.key not in new:
            continue
        init = new[shard.key]
        if not isinstance(init, Uniform):
            continue  # built as zeros
        whole = torch.empty(shard.global_shape)
        whole.uniform_(-init.bound, init.bound, generator=generator(seed, shard.key))
        local = (1,) * (len(shard.global_shape) - len(shard.local_shape)) + tuple(shard.local_shape)
        place = tuple(
            slice(start, start + size) for start, size in zip(shard.global_offset, local, strict=True)
        )
        shard.data.copy_(whole[place].view(shard.local_shape))


def freeze_base(model: HybridGPTModel | ModelChunks) -> None:
    """Switch off all gradients but those of what trains, where the rest is frozen.

    Raises ConfigurationError where experts that train and others lie in one parameter.
    """
    config = model.model_config
    if not trains_in_part(config):
        return
    experts = trained_experts(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not experts and trains(config, name))
    for module in model.modules() if experts else ():
        if isinstance(module, HoldsExperts):
            for weight in module.weights_of_experts(experts):
                weight.requires_grad_(True)
