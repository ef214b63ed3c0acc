"""The CPU patches stay inside megatron-core."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import pytest
import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime import megatron_cpu, patches
from spikingbrain_train.runtime.host_torch import FACTORIES, HOST_TORCH, rebind
from tests.distributed.pool import RankPool

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where CUDA is missing")


@pytest.mark.parametrize("name", FACTORIES)
def test_host_torch_allocates_on_the_host_where_cuda_is_asked_for(name: str) -> None:
    arguments = {
        "arange": (3,),
        "empty_like": (torch.ones(2),),
        "full": ((2,), 1.0),
        "tensor": ([1.0],),
    }.get(name, ((2,),))
    factory = getattr(HOST_TORCH, name)
    for device in ("cuda", torch.device("cuda", 0), "cuda:1", HOST_TORCH.cuda.current_device(), None):
        assert factory(*arguments, device=device).device.type == "cpu"
    assert factory(*arguments, device="meta").device.type == "meta"


def test_host_torch_is_torch_in_everything_else() -> None:
    own = {"cuda", *FACTORIES}
    wrapped_later = {"manual_seed"}  # by torch._dynamo, if it is imported after HOST_TORCH is made
    differing = [
        name
        for name in vars(torch)
        if not name.startswith("_") and getattr(HOST_TORCH, name) is not getattr(torch, name)
    ]
    assert set(differing) - wrapped_later == own
    with pytest.raises(AttributeError):
        HOST_TORCH.no_such_function  # noqa: B018  (the lookup is what is tested)


def test_modules_without_torch_are_left_alone() -> None:
    bare, own = ModuleType("bare"), ModuleType("own")
    own.torch = "not torch"
    for module in (bare, own):
        rebind(module)
    assert not hasattr(bare, "torch") and own.torch == "not torch"


def _what_is_patched(groups: ProcessGroups) -> dict[str, object]:
    lazily_imported = "megatron.core.energy_monitor"
    assert lazily_imported not in sys.modules
    try:
        torch.zeros(1, device="cuda")
        raised = False
    except (AssertionError, RuntimeError):
        raised = True
    megatron = [
        module
        for name, module in sys.modules.items()
        if name.startswith("megatron") and isinstance(vars(module).get("torch"), ModuleType)
    ]
    compiled = [
        f"{module.__name__}.{name}"
        for module in megatron
        for name, value in vars(module).items()
        if megatron_cpu._is_compiled(value)
    ]
    return {
        "applied": patches.apply(groups.accelerator),
        "torch itself still refuses cuda": raised,
        "not rebound": [module.__name__ for module in megatron if vars(module)["torch"] is torch],
        "rebound": len(megatron),
        "imported later": vars(importlib.import_module(lazily_imported))["torch"] is HOST_TORCH,
        "our own modules": vars(megatron_cpu)["torch"] is torch,
        "compiled": compiled,
        "type name": torch.ones(1).type(),
    }


@CPU_ONLY
def test_patches_reach_all_of_megatron_and_nothing_else(ranks: RankPool) -> None:
    [facts] = ranks.run(_what_is_patched, world_size=1, parallel=ParallelConfig())
    applied = facts.pop("applied")
    assert {patch.name for patch in megatron_cpu.PATCHES} < set(applied)
    assert facts.pop("rebound") > 50
    assert facts == {
        "torch itself still refuses cuda": True,
        "not rebound": [],
        "imported later": True,
        "our own modules": True,
        "compiled": [],
        "type name": "torch.FloatTensor",
    }


def _draws_inside_and_outside_a_fork(groups: ProcessGroups) -> dict[str, list[float]]:
    from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)
    torch.manual_seed(7)
    plain = torch.rand(4)
    torch.manual_seed(7)
    first = torch.rand(2)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(2)
    second = torch.rand(2)

    x = torch.ones(64, requires_grad=True)
    checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), False, x).sum().backward()
    torch.manual_seed(7)
    torch.rand(4)
    kept = torch.nn.functional.dropout(torch.ones(64), 0.5)
    return {
        "plain": plain.tolist(),
        "around": torch.cat([first, second]).tolist(),
        "forked": forked.tolist(),
        "recomputed mask": x.grad.tolist(),
        "mask": kept.tolist(),
        "warnings": warnings,
    }


@CPU_ONLY
def test_rng_tracker_forks_the_cpu_generator(ranks: RankPool) -> None:
    """A fork leaves the default stream alone and differs between TP ranks; recomputation repeats dropout."""
    a, b = ranks.run(
        _draws_inside_and_outside_a_fork,
        world_size=2,
        parallel=ParallelConfig(tensor_model_parallel_size=2),
    )
    for rank in (a, b):
        assert rank["around"] == rank["plain"]
        assert rank["recomputed mask"] == rank["mask"]
        assert rank["warnings"] == []
    assert a["forked"] != b["forked"]


def _clip(groups: ProcessGroups) -> tuple[list[float], str]:
    from megatron.core.optimizer import optimizer

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    # As imported by name in the optimizer's module: the patched function must have got there too.
    optimizer.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    return parameter.grad.tolist(), parameter.type()


@CPU_ONLY
def test_gradients_are_clipped_and_type_names_return(ranks: RankPool) -> None:
    [(gradient, type_name)] = ranks.run(_clip, world_size=1, parallel=ParallelConfig())
    assert gradient == pytest.approx([0.6, 0.8], rel=1e-5)
    assert type_name == "torch.FloatTensor"
