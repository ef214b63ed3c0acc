"""RMSNorm that works under sequence parallelism on every platform.

megatron-core offers Transformer Engine's and Apex's norms (GPU only) and a torch norm that refuses sequence
parallelism; this is the torch norm plus the one thing that sequence parallelism needs.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spikingbrain_train.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.Module):
    """``x / rms(x) * weight`` over the last dimension, with float32 statistics.

    The weight is replicated over tensor-parallel ranks. Under sequence parallelism each rank normalises its
    own share of the sequence, so the weight's gradients are partial sums; the ``sequence_parallel`` mark on
    the parameter makes megatron-core's ``finalize_model_grads`` add them up.

    Args:
        config: transformer config of the model.
        hidden_size: size of the last dimension.
        eps: term added to the mean square.
        sequence_parallel: whether ranks see different parts of the sequence; None takes it from the config.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        sequence_parallel: bool | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if sequence_parallel is None:
            sequence_parallel = config.sequence_parallel
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]; the result has its dtype."""
        return rms_norm(x, self.weight, self.eps)
