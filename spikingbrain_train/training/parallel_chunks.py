"""The virtual pipeline stages of a rank as they train, each in megatron-core's data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from spikingbrain_train.models.gpt_model import ModelChunks
from spikingbrain_train.training.engines.engine import TrainedModel


class ParallelChunks(torch.nn.ModuleList):
    """What a run asks of megatron-core's DistributedDataParallel, of several.

    Args:
        model: the chunks themselves.
        wrapped: each of them in data parallelism.
    """

    module: ModelChunks

    def __init__(self, model: ModelChunks, wrapped: Sequence[DistributedDataParallel]) -> None:
        super().__init__(wrapped)
        object.__setattr__(self, "module", model)  # no submodule: the wrapped chunks hold all of it

    @property
    def ddp_config(self) -> DistributedDataParallelConfig:
        """The same of all chunks."""
        config: DistributedDataParallelConfig = self[0].ddp_config
        return config

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero."""
        for chunk in parallel_chunks(self):
            chunk.zero_grad_buffer()


def parallel_chunks(model: TrainedModel) -> list[Any]:
    """What megatron-core's schedules and optimizers take: a list of chunks, in the order of the model.

    Each is a :class:`~spikingbrain_train.training.engines.engine.TrainedChunk`.
    """
    return list(model) if isinstance(model, ParallelChunks) else [model]
