"""Backends of the selective scan (ops/selective_scan)."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import Backend, Backends

_LARGEST_STATE = 256  # MAX_DSTATE of mamba_ssm's kernel


@dataclass(frozen=True)
class SelectiveScanCall:
    """What decides which backends can compute a call of the selective scan."""

    dtype: str
    """Of the inputs: torch's name, such as ``bfloat16``."""
    state_size: int
    """Numbers that a channel remembers."""
    passes_states: bool = False
    """Whether it begins with a state, or gradients reach the one that it ends with."""


def _mamba_ssm_limit(call: SelectiveScanCall) -> str | None:
    if call.dtype == "float64":
        return "computes in float32, not float64"
    if call.state_size > _LARGEST_STATE:
        return f"takes state_size up to {_LARGEST_STATE}, not {call.state_size}"
    if call.passes_states:
        return "begins with empty states and passes no gradients to those that it ends with"
    return None


def _preference(call: SelectiveScanCall, on_gpu: bool) -> tuple[str, ...]:
    return ("mamba_ssm", "chunk") if on_gpu else ("chunk",)


SELECTIVE_SCAN: Backends[SelectiveScanCall] = Backends(
    "selective_scan",
    (
        Backend(
            "mamba_ssm",
            "mamba_ssm",
            "mamba-ssm",
            gpu=True,
            limit=_mamba_ssm_limit,
            varies="adds up gradients of A, B and C by atomic additions",
        ),
        Backend("chunk"),
        Backend("naive"),
    ),
    _preference,
)
