"""Backends of gated linear attention (ops/gated_linear_attention)."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import Backend, Backends


@dataclass(frozen=True)
class LinearAttentionCall:
    """What decides which backends can compute a call of gated linear attention."""

    dtype: str
    """Of queries, keys and values: torch's name, such as ``bfloat16``."""


def _fla_limit(call: LinearAttentionCall) -> str | None:
    return "computes in float32, not float64" if call.dtype == "float64" else None


def _preference(call: LinearAttentionCall, on_gpu: bool) -> tuple[str, ...]:
    return ("fla", "chunk") if on_gpu else ("chunk",)


GATED_LINEAR_ATTENTION: Backends[LinearAttentionCall] = Backends(
    "gated_linear_attention",
    (
        Backend(
            "fla",
            "fla",
            "flash-linear-attention",
            gpu=True,
            limit=_fla_limit,
            varies="tunes its kernels in every process, and other blocks sum in another order",
        ),
        Backend("chunk"),
        Backend("naive"),
    ),
    _preference,
)
