"""Backends of full and sliding-window softmax attention (ops/softmax_attention)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from spikingbrain_train.architecture.backends.backend import Backend, Backends, Machine

_FLASH_ATTN_DTYPES = ("float16", "bfloat16")
_FLASH_ATTN_HEAD_DIM = 256
_NARROWEST_HEAD = 16  # of a Triton matrix product


@dataclass(frozen=True)
class SoftmaxAttentionCall:
    """What decides which backends can compute a call of softmax attention."""

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


def _flash_attn_limit(call: SoftmaxAttentionCall) -> str | None:
    """What flash-attn cannot do.

    Sinks are the first keys of a causal sequence to it, but its windows leave out whatever lies before them.
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


def _flex_limit(call: SoftmaxAttentionCall) -> str | None:
    width = min(call.key_dim, call.value_dim)
    if width < _NARROWEST_HEAD:
        return f"needs heads of width {_NARROWEST_HEAD} or more, not {width}"
    return None


def _flex_limit_here(call: SoftmaxAttentionCall, machine: Machine) -> str | None:
    widths = (call.key_dim, call.value_dim)
    if all(width & (width - 1) == 0 for width in widths):
        return None
    # torch 2.6 names its check of widths; later versions take any.
    if not machine.defines("torch.nn.attention.flex_attention:_supported_head_dim"):
        return None
    return f"needs heads whose width is a power of 2 in torch {version('torch')}, not {max(widths)}"


def _preference(call: SoftmaxAttentionCall, on_gpu: bool) -> tuple[str, ...]:
    """On a GPU flash-attn, where it can.

    Then torch's own kernel for full attention in one document, and flex for windows and documents. Where flex
    cannot be compiled, full attention goes document by document.
    """
    if not on_gpu:
        return ("blocked",)
    if not call.is_full:
        return ("flash_attn", "flex", "blocked")
    return ("flash_attn", "flex", "sdpa") if call.has_documents else ("flash_attn", "sdpa")


SOFTMAX_ATTENTION: Backends[SoftmaxAttentionCall] = Backends(
    "softmax_attention",
    (
        Backend("flash_attn", "flash_attn", "flash-attn", gpu=True, limit=_flash_attn_limit),
        Backend(
            "flex",
            "triton",
            gpu=True,
            limit=_flex_limit,
            limit_here=_flex_limit_here,
            varies="is compiled without a promise of equal bits",
        ),
        Backend("sdpa"),
        Backend("blocked"),
        Backend("naive"),
    ),
    _preference,
)
