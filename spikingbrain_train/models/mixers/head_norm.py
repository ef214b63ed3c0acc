"""Norms of every head with one weight for all of them: of queries and keys, and behind a recurrence."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.models.rms_norm import RMSNorm
from spikingbrain_train.ops.rms_norm import rms_norm


class SharedHeadNorm(RMSNorm):
    """RMSNorm of heads. A new parameter: a dense source does not have it.

    Args:
        config: transformer config of the model.
        init: initial weight.
        tp_group: tensor-parallel ranks, each of which normalises heads of its own.
    """

    def __init__(self, config: TransformerConfig, init: float, tp_group: ProcessGroup) -> None:
        assert config.kv_channels is not None
        super().__init__(config, config.kv_channels, eps=config.layernorm_epsilon, sequence_parallel=False)
        self.tp_group = tp_group
        self.weight.is_new_parameter = True  # type: ignore[attr-defined]
        if config.perform_initialization:
            torch.nn.init.constant_(self.weight, init)

    def forward(self, heads: Tensor) -> Tensor:
        """Heads of this rank, [..., K]."""
        # The one shared weight's gradient is a partial sum on each rank; megatron-core's copy into the
        # tensor-parallel region adds the parts up in the backward pass.
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        return rms_norm(heads, weight, self.eps)


class HeadNorm(SharedHeadNorm):
    """The norm behind a recurrence."""

    def forward(self, o_BTHV: Tensor) -> Tensor:
        """Heads of this rank [B, T, H, V] to what the output projection reads [T, B, H * V]."""
        return super().forward(o_BTHV).transpose(0, 1).flatten(2)
