"""A causal convolution of every channel by itself, split over tensor-parallel ranks as its channels are.

Text does not see sinks: what a convolution carries are a few neighbours, what sinks carry is for all text.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.models.split_parameters import sharded_first_axes
from spikingbrain_train.ops.causal_convolution import causal_convolution
from spikingbrain_train.parallel.context_parallel.causal_convolution import (
    context_parallel_causal_convolution,
)
from spikingbrain_train.parallel.context_parallel.reading_on import inputs_before_slice


class ShortConvolution(torch.nn.Module):
    """Kernels [channels of this rank, width] that begin as the identity.

    Args:
        config: transformer config of the model.
        channels: of this tensor-parallel rank.
        width: tokens that a kernel reads, its own included.
        tp_group: tensor-parallel ranks, each of which has channels of its own.
    """

    def __init__(self, config: TransformerConfig, channels: int, width: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.empty(channels, width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.weight.is_new_parameter = True  # type: ignore[attr-defined]
        if config.perform_initialization:
            with torch.no_grad():
                self.weight.zero_()[:, -1] = 1.0

    def forward(self, x_BTD: Tensor, layout: SequenceLayout | None, cp_group: ProcessGroup | None) -> Tensor:
        """[B, T, channels] of a slice to the same."""
        return context_parallel_causal_convolution(
            x_BTD, self.weight, None, layout=layout, cp_group=cp_group, sees_sinks=False
        )

    def last_inputs(self, x_BTD: Tensor, layout: SequenceLayout) -> Tensor:
        """What a text leaves behind: its last width - 1 inputs [B, width - 1, channels], zeros before it."""
        before = self.weight.shape[1] - 1
        text = x_BTD[:, layout.local_sink_tokens :]
        return torch.nn.functional.pad(text, (0, 0, before, 0))[:, text.shape[1] :].clone()

    def read_on(
        self, x_BTD: Tensor, inputs_BSD: Tensor, cp_group: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next tokens behind the last inputs, and the last inputs with them.

        With ``cp_group`` they are this rank's slice of a piece, and the last inputs are those of the piece.
        """
        if cp_group is not None:
            before, behind = inputs_before_slice(x_BTD, inputs_BSD, cp_group)
            return causal_convolution(x_BTD, self.weight, initial_state=before)[0], behind
        y, inputs = causal_convolution(x_BTD, self.weight, initial_state=inputs_BSD, output_final_state=True)
        assert inputs is not None
        return y, inputs.clone()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As megatron-core's modules have it."""
        return sharded_first_axes({"weight": self.weight}, prefix, sharded_offsets, self.tp_group, metadata)
