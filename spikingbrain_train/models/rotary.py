"""Rotary positions of the tokens that a rank holds.

Scaling depends on the length of a text for two kinds, ``dynamic`` and ``longrope``: beyond its original
context a text is turned by other frequencies than within it. Here each document has the frequencies of its
own whole length, wherever it is packed or split, as transformers has them of a text on its own. A text that
is read token by token grows: a new token is turned by the length up to it, and what was read before stays as
it was turned then, as in transformers' cached generation.
"""

from __future__ import annotations

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spikingbrain_train.architecture.backends.rotary import ROTARY, RotaryCall
from spikingbrain_train.architecture.rotary import depends_on_length
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import RotaryBackend
from spikingbrain_train.ops.rotary import scaled_frequencies
from spikingbrain_train.runtime.packages import machine_of


def turned(
    x_TBHK: Tensor, angles: Tensor, config: TransformerConfig, backend: RotaryBackend = RotaryBackend.auto
) -> Tensor:
    """Queries or keys turned by their positions.

    Args:
        x_TBHK: [T, B, heads or groups, kv_channels], of any strides.
        angles: [T, 1 or B, 1, kv_channels] float32, from :class:`RotaryPositions`.
        config: of the layer.
        backend: of whom ``auto`` takes the best that is here and can.

    Raises:
        ValueError: the backend asked for cannot do this.
        PlatformError: the backend asked for needs a package or a GPU that is missing.
    """
    call = RotaryCall(rows_differ=angles.shape[1] > 1)
    if ROTARY.choose(backend.value, call, machine_of(x_TBHK.device.type)) == "transformer_engine":
        found: Tensor = transformer_engine.fused_apply_rotary_pos_emb(x_TBHK, angles)
        return found
    return apply_rotary_pos_emb(x_TBHK, angles, config)


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
        self._base, self._scaling = model.rotary_base, model.rope_scaling
        self._unscaled = self.inv_freq
        if not depends_on_length(self._scaling):
            self.inv_freq = self._frequencies(0)
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
        angles = torch.stack([self._angles_of_row(layout, row) for row in range(rows)], dim=1)
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)

    def _angles_of_row(self, layout: SequenceLayout, row: int) -> Tensor:
        """[slice_length, kv_channels / 2] float32."""
        if not depends_on_length(self._scaling):
            return self._positions(layout, row).unsqueeze(-1) * self.inv_freq
        pieces = [torch.zeros(layout.local_sink_tokens, len(self.inv_freq), device=self.inv_freq.device)]
        for document in layout.local_documents(row):
            positions = self._range(document.before, document.length)
            pieces.append(positions.unsqueeze(-1) * self._frequencies(document.total))
        return torch.cat(pieces)

    def _positions(self, layout: SequenceLayout, row: int) -> Tensor:
        """[slice_length] float32 position of each token in its document."""
        pieces = [torch.zeros(layout.local_sink_tokens, device=self.inv_freq.device)]
        pieces += [self._range(document.before, document.length) for document in layout.local_documents(row)]
        return torch.cat(pieces)

    def _range(self, start: int, length: int) -> Tensor:
        return torch.arange(start, start + length, dtype=torch.float32, device=self.inv_freq.device)

    def _frequencies(self, text_length: int) -> Tensor:
        return scaled_frequencies(self._unscaled, self._base, self._scaling, text_length)
