"""Linears of Transformer Engine are called within its autocast, with the tokens that it takes; those on CPUs
multiply FP8 numbers while they train and are what they were otherwise.

Transformer Engine is not there: its linears stand here as products that insist on what the real ones ask for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.backends.fp8 import RECIPES, RECIPES_MODULE
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format, Fp8Recipe
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.parallel import AcceleratorKind, KernelConfig, ParallelLinearBackend
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.models.linears.fp8 import in_fp8
from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
from spikingbrain_train.ops.fp8 import fp8_linear, rounding_of
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.fp8 import require_fp8

FP8 = Fp8Config(Fp8Format.hybrid)
TRANSFORMER_ENGINE = ParallelLinearBackend.transformer_engine
ACTIVE: list[str] = []
"""Recipes whose autocast is entered, the innermost last."""


@contextmanager
def autocast(enabled: bool, recipe: str) -> Iterator[None]:
    assert enabled
    ACTIVE.append(recipe)
    try:
        yield
    finally:
        ACTIVE.pop()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, with what FP8 is asked for by."""
    modules = {name: ModuleType(name) for name in ("transformer_engine.pytorch", RECIPES_MODULE)}
    vars(modules["transformer_engine.pytorch"])["autocast"] = autocast
    recipes = vars(modules[RECIPES_MODULE])
    recipes["Format"] = SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID")
    for needs in RECIPES.values():
        recipes[needs.recipe_class] = lambda fp8_format, name=needs.recipe_class: f"{name} {fp8_format}"
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


class Linear(torch.nn.Module):
    """One weight for each expert, or one; rows that Transformer Engine refuses in FP8 fail."""

    multiple = 16

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(48, 32) for _ in range(experts))
        self.seen: list[tuple[str | None, list[int]]] = []

    def forward(self, x: Tensor, m_splits: list[int] | None = None) -> tuple[Tensor, None]:
        rows = [x.shape[:-1].numel()] if m_splits is None else m_splits
        assert sum(rows) == x.shape[:-1].numel()
        if ACTIVE:
            assert all(each % self.multiple == 0 for each in rows), f"{rows} rows in FP8"
        self.seen.append((ACTIVE[-1] if ACTIVE else None, list(rows)))
        parts = x.reshape(-1, 32).split(rows)
        outputs = [part @ weight.t() for part, weight in zip(parts, self.weights, strict=True)]
        return torch.cat(outputs).view(*x.shape[:-1], 48), None


def linear_of(recipe: Fp8Recipe = Fp8Recipe.tensorwise, experts: int = 1) -> Any:
    made = in_fp8(Linear, Fp8Config(Fp8Format.hybrid, recipe), TRANSFORMER_ENGINE)(experts)
    made.multiple, Linear.multiple = RECIPES[recipe].multiple, RECIPES[recipe].multiple
    return made


@pytest.mark.parametrize("recipe", Fp8Recipe)
def test_a_linear_multiplies_within_the_autocast_of_its_recipe(engine: None, recipe: Fp8Recipe) -> None:
    linear = linear_of(recipe)
    linear(torch.randn(32, 2, 32))
    assert linear.seen == [(f"{RECIPES[recipe].recipe_class} HYBRID", [64])]
    assert not ACTIVE


def test_a_linear_that_is_computed_again_is_so_within_it(engine: None) -> None:
    from torch.utils.checkpoint import checkpoint

    linear, x = linear_of(), torch.randn(32, 2, 32, requires_grad=True)
    output = checkpoint(lambda x: linear(x)[0], x, use_reentrant=True)
    output.sum().backward()
    assert [recipe for recipe, _ in linear.seen] == ["Float8CurrentScaling HYBRID"] * 2


def test_outside_of_training_it_multiplies_in_bf16_whatever_the_tokens(engine: None) -> None:
    linear = linear_of().eval()
    linear(torch.randn(3, 1, 32))
    assert linear.seen == [(None, [3])]


@pytest.mark.parametrize("recipe", Fp8Recipe)
def test_tokens_of_experts_are_filled_up_and_the_result_is_that_without(
    engine: None, recipe: Fp8Recipe
) -> None:
    linear, sizes = linear_of(recipe, experts=4), [5, 0, 64, 17]
    x = torch.randn(sum(sizes), 32, requires_grad=True)
    multiple = RECIPES[recipe].multiple
    output, _ = linear(x, sizes)
    expected, _ = Linear.forward(linear.eval(), x, sizes)
    assert linear.seen[0][1] == [-(-size // multiple) * multiple for size in sizes]
    assert torch.equal(output, expected)
    dy = torch.randn_like(output)
    inputs = [x, *linear.weights]
    found, plain = torch.autograd.grad(output, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_expert_after_the_other_is_filled_up_as_well(engine: None) -> None:
    linear = linear_of()
    output, _ = linear(torch.randn(7, 32))
    assert output.shape == (7, 48) and linear.seen[0][1] == [16]
    output, _ = linear(torch.randn(0, 32))
    assert output.shape == (0, 48)


def test_a_class_is_made_once() -> None:
    first, second = (ParallelLinears(ParallelLinearBackend.megatron, fp8=FP8) for _ in range(2))
    assert first.column(Projection.qkv) is second.column(Projection.qkv)


def test_gates_stay_what_they_are() -> None:
    plain = ParallelLinears(ParallelLinearBackend.megatron)
    fp8 = ParallelLinears(ParallelLinearBackend.megatron, fp8=FP8)
    for projection in Projection:
        is_same = fp8.column(projection) is plain.column(projection)
        assert is_same == (projection is Projection.gate)


MACHINES: dict[str, tuple[Accelerator, tuple[int, int], str, Fp8Recipe, str]] = {
    "MetaX": (
        Accelerator(AcceleratorKind.metax, "MetaX C550", 8),
        (8, 0),
        "12.9",
        Fp8Recipe.tensorwise,
        "needs an NVIDIA GPU, but this is MetaX C550",
    ),
    "A100": (
        Accelerator(AcceleratorKind.cuda, "NVIDIA A100", 8),
        (8, 0),
        "12.9",
        Fp8Recipe.tensorwise,
        "needs a GPU of compute capability 8.9 or later (Ada, Hopper), and this GPU has compute capability "
        "8.0; set fp8.format=null",
    ),
    "H100, blocks of 32": (
        Accelerator(AcceleratorKind.cuda, "NVIDIA H100", 8),
        (9, 0),
        "12.9",
        Fp8Recipe.mxfp8,
        "and this GPU has compute capability 9.0; choose fp8.recipe=tensorwise or blockwise, or set",
    ),
    "H100, an older CUDA": (
        Accelerator(AcceleratorKind.cuda, "NVIDIA H100", 8),
        (9, 0),
        "12.8",
        Fp8Recipe.blockwise,
        "needs torch built for CUDA 12.9 or later, and this one is for 12.8; choose fp8.recipe=tensorwise",
    ),
    "Blackwell of work stations": (
        Accelerator(AcceleratorKind.cuda, "NVIDIA RTX PRO 6000", 8),
        (12, 0),
        "12.9",
        Fp8Recipe.mxfp8,
        "needs a GPU of compute capability 10.0 to 11 (Blackwell of data centres)",
    ),
    "H100 without Transformer Engine": (
        Accelerator(AcceleratorKind.cuda, "NVIDIA H100", 8),
        (9, 0),
        "12.9",
        Fp8Recipe.tensorwise,
        "those of this run are cluster.kernels.parallel_linear=megatron; install transformer-engine",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_that_has_no_such_products_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, capability, cuda, recipe, sentence = MACHINES[name]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    kernels = KernelConfig(parallel_linear=ParallelLinearBackend.megatron)
    with pytest.raises(PlatformError) as error:
        require_fp8(Fp8Config(Fp8Format.hybrid, recipe), kernels, accelerator)
    assert sentence in str(error.value)
    require_fp8(Fp8Config(), kernels, accelerator)


def test_a_release_without_the_recipe_is_refused(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    kernels = KernelConfig(parallel_linear=TRANSFORMER_ENGINE)
    accelerator = Accelerator(AcceleratorKind.cuda, "NVIDIA H100", 8, {"transformer_engine": "2.1.0"})
    require_fp8(FP8, kernels, accelerator)
    del vars(sys.modules[RECIPES_MODULE])["Float8CurrentScaling"]
    with pytest.raises(PlatformError, match=r"needs Transformer Engine 2\.2 or later.*2\.1\.0 is installed"):
        require_fp8(FP8, kernels, accelerator)


def test_cpus_compute_every_recipe() -> None:
    for recipe in Fp8Recipe:
        require_fp8(
            Fp8Config(Fp8Format.e4m3, recipe), KernelConfig(), Accelerator(AcceleratorKind.cpu, "a CPU", 0)
        )


def test_a_frozen_weight_gets_no_gradient_and_its_input_one() -> None:
    """The base beside adapters."""
    x, weight = torch.randn(8, 32, requires_grad=True), torch.randn(48, 32)
    output = fp8_linear(x, weight, rounding_of(Fp8Format.hybrid, Fp8Recipe.tensorwise))
    output.sum().backward()
    assert x.grad is not None and weight.grad is None
