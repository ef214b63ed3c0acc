"""Full and sliding-window softmax attention as the core of megatron-core's SelfAttention.

SelfAttention keeps its projections, rotary positions, q/k norms and tensor parallelism; only the part between
the projections is ours (SpikingBrain, arXiv 2509.05276, eq. 1-2).
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spikingbrain_train.config.parallel import SoftmaxAttentionBackend
from spikingbrain_train.ops.sliding_window_attention import sliding_window_attention


class SoftmaxCoreAttention(torch.nn.Module):
    """Causal attention over this rank's heads; a drop-in for megatron-core's DotProductAttention.

    Args:
        config: transformer config of the model.
        window: keys (the current one included) that a query sees; None for all before it.
        backend: kernel choice, see :class:`~spikingbrain_train.config.parallel.SoftmaxAttentionBackend`.
        softmax_scale: factor on the logits; None for ``kv_channels ** -0.5``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        window: int | None,
        backend: SoftmaxAttentionBackend,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.window = window
        self.backend = backend.value
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, B, H, K] rotated queries of this rank's heads.
            key: [T, B, G, K] rotated keys of this rank's groups.
            value: [T, B, G, K].
            attention_mask: must be None; causality and the window are built in.

        Returns:
            [T, B, H * K].
        """
        assert attention_mask is None, "causal and window masks are built in; pass attention_mask=None"
        q_BTHK, k_BTGK, v_BTGK = (x.transpose(0, 1) for x in (query, key, value))
        o_BTHK = sliding_window_attention(
            q_BTHK, k_BTGK, v_BTGK, window=self.window, scale=self.scale, backend=self.backend
        )
        return o_BTHK.transpose(0, 1).flatten(2)
