"""What a kernel cannot compute on any machine: asked by the ops before they choose one, and at start-up
before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.config.model import SpikingConfig
from spikingbrain_train.config.run import Precision

_FLASH_ATTN_DTYPES = ("float16", "bfloat16")
_FLASH_ATTN_HEAD_DIM = 256


@dataclass(frozen=True)
class SoftmaxAttentionCall:
    """What decides which kernels can compute a call of softmax attention."""

    dtype: str
    """Of queries, keys and values: torch's name, such as ``bfloat16``."""
    key_dim: int
    value_dim: int
    num_text_keys: int
    """Keys of text, the sinks left out."""
    window: int | None = None
    """Text keys that a query sees, its own included; None or at least num_text_keys is full attention."""
    num_sink_tokens: int = 0
    has_documents: bool = False
    """Whether the text is several documents that do not see each other."""

    @property
    def is_full(self) -> bool:
        """Whether no window hides text."""
        return self.window is None or self.window >= self.num_text_keys


def flash_attn_limit(call: SoftmaxAttentionCall) -> str | None:
    """What flash-attn cannot do of a call, None if it can do all.

    To it, sinks are the first keys of a causal sequence, but its windows leave out whatever lies before them.
    """
    if call.dtype not in _FLASH_ATTN_DTYPES:
        return f"needs float16 or bfloat16, not {call.dtype}"
    if call.key_dim != call.value_dim or call.key_dim > _FLASH_ATTN_HEAD_DIM:
        return (
            f"needs heads of one width up to {_FLASH_ATTN_HEAD_DIM} for keys and values, not {call.key_dim} "
            f"and {call.value_dim}"
        )
    if call.num_sink_tokens > 0 and not call.is_full:
        return f"cannot combine {call.num_sink_tokens} sink tokens with a window of {call.window}"
    return None


def grouped_gemm_limit(precision: Precision, spiking: SpikingConfig) -> str | None:
    """What the package grouped_gemm cannot do for the experts of a run, None if it can do all."""
    if precision is Precision.fp32:
        return "multiplies bfloat16 only, but precision=fp32"
    if spiking.in_experts:
        return (
            "cannot encode spikes inside experts, which mlp_fc1 and mlp_fc2 in model.spiking.projections ask "
            "for"
        )
    return None
