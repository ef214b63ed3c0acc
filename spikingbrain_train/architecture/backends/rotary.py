"""Backends of rotary positions (models/rotary.py)."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import Backend, Backends, Machine
from spikingbrain_train.config.parallel import AcceleratorKind, RotaryBackend


@dataclass(frozen=True)
class RotaryCall:
    """What decides who can turn queries and keys by their positions."""

    rows_differ: bool
    """Whether rows of a batch have positions of their own, as documents of several rows have."""


def on_platform(choice: RotaryBackend, platform: AcceleratorKind) -> RotaryBackend:
    """The choice, with ``auto`` settled away from NVIDIA's GPUs: calls do not know on whose they are."""
    if choice is RotaryBackend.auto and platform is not AcceleratorKind.cuda:
        return RotaryBackend.megatron
    return choice


def _transformer_engine_limit(call: RotaryCall) -> str | None:
    return (
        "turns all rows of a batch alike, but their documents begin elsewhere" if call.rows_differ else None
    )


def _transformer_engine_limit_here(call: RotaryCall, machine: Machine) -> str | None:
    if machine.defines("megatron.core.extensions.transformer_engine:fused_apply_rotary_pos_emb"):
        return None
    return "needs Transformer Engine 1.10 or later, with fused rotary positions"


def _preference(call: RotaryCall, on_gpu: bool) -> tuple[str, ...]:
    return ("transformer_engine", "megatron") if on_gpu else ("megatron",)


ROTARY: Backends[RotaryCall] = Backends(
    "rotary",
    (
        Backend(
            "transformer_engine",
            "transformer_engine",
            gpu=True,
            limit=_transformer_engine_limit,
            limit_here=_transformer_engine_limit_here,
        ),
        Backend("megatron"),
    ),
    _preference,
)
