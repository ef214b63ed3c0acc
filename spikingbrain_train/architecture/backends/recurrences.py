"""Backends of recurrences that flash-linear-attention has kernels for."""

from __future__ import annotations

from collections.abc import Callable

from spikingbrain_train.architecture.backends.backend import Backend, Backends, Call


def recurrence_backends(op: str, fla_limit: Callable[[Call], str | None]) -> Backends[Call]:
    """``fla`` on GPUs, else ``chunk``; ``naive`` is the definition.

    Args:
        op: what the setting below ``cluster.kernels`` is called.
        fla_limit: what of a call fla's kernel cannot do, in words that follow its name; None: it can.
    """
    fla = Backend(
        "fla",
        "fla",
        "flash-linear-attention",
        gpu=True,
        limit=fla_limit,
        varies="tunes its kernels in every process, and other blocks sum in another order",
    )
    return Backends(op, (fla, Backend("chunk"), Backend("naive")), _preference)


def _preference(call: object, on_gpu: bool) -> tuple[str, ...]:
    return ("fla", "chunk") if on_gpu else ("chunk",)
