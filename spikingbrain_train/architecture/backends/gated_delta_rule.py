"""Backends of the gated delta rule (ops/gated_delta_rule)."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import Backends
from spikingbrain_train.architecture.backends.recurrences import recurrence_backends


@dataclass(frozen=True)
class DeltaRuleCall:
    """What decides which backends can compute a call of the gated delta rule."""

    dtype: str
    """Of queries, keys and values: torch's name, such as ``bfloat16``."""
    key_dim: int
    """Width of queries and keys."""


_WIDEST_KEY = 256
"""Of fla's kernels, which hold whole keys in the memory of a multiprocessor."""


def _fla_limit(call: DeltaRuleCall) -> str | None:
    if call.dtype == "float64":
        return "computes in float32, not float64"
    if call.key_dim > _WIDEST_KEY:
        return f"needs keys of width {_WIDEST_KEY} at most, not {call.key_dim}"
    return None


GATED_DELTA_RULE: Backends[DeltaRuleCall] = recurrence_backends("gated_delta_rule", _fla_limit)
