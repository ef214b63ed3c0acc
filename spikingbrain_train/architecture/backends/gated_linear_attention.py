"""Backends of gated linear attention (ops/gated_linear_attention)."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import Backends
from spikingbrain_train.architecture.backends.recurrences import recurrence_backends


@dataclass(frozen=True)
class LinearAttentionCall:
    """What decides which backends can compute a call of gated linear attention."""

    dtype: str
    """Of queries, keys and values: torch's name, such as ``bfloat16``."""


def _fla_limit(call: LinearAttentionCall) -> str | None:
    return "computes in float32, not float64" if call.dtype == "float64" else None


GATED_LINEAR_ATTENTION: Backends[LinearAttentionCall] = recurrence_backends(
    "gated_linear_attention", _fla_limit
)
