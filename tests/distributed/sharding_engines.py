"""Engines that cut parameters into parts, and what tests of them need to be installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from spikingbrain_train.config.parallel import EngineKind, ParallelConfig, ZeroConfig
from spikingbrain_train.planning import engine_checks

FSDP = ParallelConfig(engine=EngineKind.fsdp)


def zero(stage: int, **changes: Any) -> ParallelConfig:
    """DeepSpeed's ZeRO; ``offload_optimizer`` is of its settings, others are of the layout."""
    offloads = changes.pop("offload_optimizer", False)
    return ParallelConfig(engine=EngineKind.deepspeed, zero=ZeroConfig(stage, offloads), **changes)


def fsdp(**changes: Any) -> ParallelConfig:
    """torch's FSDP2."""
    return replace(FSDP, **changes)


@lru_cache
def _is_here(engine: EngineKind) -> bool:
    if engine is EngineKind.deepspeed:
        return importlib.util.find_spec("deepspeed") is not None
    return engine is not EngineKind.fsdp or engine_checks._torch_sums()


def needs(*engines: EngineKind) -> list[pytest.MarkDecorator]:
    """Marks of a test that runs with these engines."""
    return [
        pytest.mark.skipif(
            not _is_here(engine), reason=f"what parallel.engine={engine.value} needs is not here"
        )
        for engine in engines
    ]


def case(*values: Any, engine: EngineKind, name: str | None = None) -> Any:
    """Parameters of a test that runs with an engine."""
    return pytest.param(*values, marks=needs(engine), id=name)
