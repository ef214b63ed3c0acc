"""Adapters of a model that trains: how they begin, and that nothing else has gradients."""

from __future__ import annotations

import torch

from spikingbrain_train.architecture.lora import adapter_of
from spikingbrain_train.checkpoint.sharded_state import sharded_weights
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.ops.seeds import generator


@torch.no_grad()
def begin_adapters(model: HybridGPTModel, seed: int) -> None:
    """Fill adapters so that they change nothing: A uniform within 1 / sqrt(inputs), as peft has it, B zero.

    The numbers depend on the seed and the parameter's name alone, not on how ranks share it.

    Args:
        model: this rank's stage.
        seed: of the run.
    """
    if not model.model_config.lora.names:
        return
    for shard in sharded_weights(model).values():
        if adapter_of(shard.key) is None:
            continue
        if shard.key.endswith("_B"):
            shard.data.zero_()
            continue
        bound = shard.global_shape[-1] ** -0.5
        source = generator(seed, shard.key)
        whole = torch.empty(shard.global_shape).uniform_(-bound, bound, generator=source)
        local = (1,) * (len(shard.global_shape) - len(shard.local_shape)) + tuple(shard.local_shape)
        place = tuple(
            slice(start, start + size) for start, size in zip(shard.global_offset, local, strict=True)
        )
        shard.data.copy_(whole[place].view(shard.local_shape))


def train_adapters_only(model: HybridGPTModel) -> None:
    """Leave gradients on in the adapters that ``model.lora.trained`` names, or in all of them."""
    lora = model.model_config.lora
    for name, parameter in model.named_parameters():
        adapter = adapter_of(name)
        parameter.requires_grad_(adapter is not None and lora.trains(adapter))
