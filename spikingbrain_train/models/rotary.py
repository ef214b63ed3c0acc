"""Rotary positions of the tokens that a rank holds."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig, RopeScalingConfig


class RotaryPositions(RotaryEmbedding):
    """megatron-core's rotary embedding for contiguous slices, sinks and documents.

    megatron-core itself counts from the start of the sequence and, under context parallelism, cuts it in the
    zigzag order of its own attention. Here positions come from the layout: they restart with every document,
    and sinks stand at position 0, which leaves them as they are (SpikingBrain's report does not say where).
    """

    inv_freq: Tensor

    def __init__(self, model: ModelConfig, *, on_cpu: bool) -> None:
        super().__init__(
            kv_channels=model.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rotary_base,
            use_cpu_initialization=on_cpu,
        )
        if model.rope_scaling.factor != 1.0:
            self.inv_freq = scale_rotary_frequencies(self.inv_freq, model.rope_scaling)
        self._last: tuple[SequenceLayout, Tensor] | None = None

    def get_rotary_seq_len(
        self,
        inference_context: object,
        transformer: object,
        transformer_input: object,
        transformer_config: object,
        packed_seq_params: SequenceLayout,
    ) -> SequenceLayout:
        """GPTModel asks for a length here and hands it to :meth:`forward`; the layout says more."""
        return packed_seq_params

    def forward(self, layout: SequenceLayout, **_: object) -> Tensor:
        """Angles of the slice's tokens: [slice_length, 1 or B, 1, kv_channels] float32."""
        if self._last is None or self._last[0] != layout:
            self._last = (layout, self._angles(layout))
        return self._last[1]

    def _angles(self, layout: SequenceLayout) -> Tensor:
        rows = 1 if layout.cu_seqlens is None else len(layout.cu_seqlens)
        positions = torch.stack([self._positions(layout, row) for row in range(rows)], dim=1)
        angles = positions.unsqueeze(-1) * self.inv_freq
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)

    def _positions(self, layout: SequenceLayout, row: int) -> Tensor:
        """[slice_length] float32 position of each token in its document."""
        device = self.inv_freq.device
        pieces = [torch.zeros(layout.local_sink_tokens, device=device)]
        for document in layout.local_documents(row):
            end = document.before + document.length
            pieces.append(torch.arange(document.before, end, dtype=torch.float32, device=device))
        return torch.cat(pieces)


def scale_rotary_frequencies(inv_freq: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Llama-3 frequency scaling: long wavelengths slow down by ``factor``, short ones stay, a ramp between.

    Args:
        inv_freq: [kv_channels / 2] float32 angular frequencies per token.
        scaling: its parameters.
    """
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
