"""A Transformer Engine that computes nothing: linears that hold their callers to what the real ones ask for.

megatron-core's own classes stand on these linears, with what they tell them; all else of megatron-core takes
the paths without Transformer Engine.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from packaging.version import Version
from torch import Tensor

RELEASE = "2.5"
RECIPE_CLASSES = ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "DelayedScaling")

PRODUCTS: list[tuple[str | None, tuple[int, ...], tuple[int, int]]] = []
"""Of every forward product the recipe it is made with, the shape of its input, and that of its weight."""
ADDED: list[tuple[int, int]] = []
"""Of every product that added its weight's gradient to ``main_grad`` the shape of that."""
_ENTERED: list[Any] = []


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Of transformer_engine.pytorch before release 2.9."""
    assert not enabled or fp8_recipe is not None
    _ENTERED.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        _ENTERED.pop()


class Recipe:
    """Any of the recipes."""

    def __init__(self, fp8_format: str) -> None:
        self.fp8_format = fp8_format


def _product(x: Tensor, weight: Tensor, adds_gradient: bool) -> Tensor:
    """x W^T of two dimensions, of sizes that FP8 has where it is asked for (assert_dim_for_fp8_exec)."""
    assert x.is_cuda and weight.is_cuda and x.dtype == weight.dtype == torch.bfloat16
    recipe = _ENTERED[-1] if _ENTERED else None
    if recipe is not None:
        multiple = 32 if type(recipe).__name__ == "MXFP8BlockScaling" else 16
        for size in (*x.shape, *weight.shape):
            assert size % multiple == 0, f"{list(x.shape)} x {list(weight.shape)} in FP8"
    PRODUCTS.append((None if recipe is None else type(recipe).__name__, tuple(x.shape), tuple(weight.shape)))
    if adds_gradient and torch.is_grad_enabled() and weight.requires_grad:
        product: Tensor = _AddsGradient.apply(x, weight)
        return product
    return x @ weight.t()


class _AddsGradient(torch.autograd.Function):
    """x W^T whose weight's gradient is added to ``main_grad``; what is returned instead has no meaning."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        assert weight.main_grad.shape == weight.shape and weight.main_grad.dtype == torch.float32
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        assert weight.grad_added_to_main_grad in (False, True)
        weight.grad_added_to_main_grad = True
        ADDED.append(tuple(weight.shape))
        return grad @ weight, torch.empty_like(weight)


class _Module(torch.nn.Module):
    def _weight(self, rows: int, columns: int, axis: int | None, **kwargs: Any) -> torch.nn.Parameter:
        weight: Any = torch.nn.Parameter(
            torch.empty(rows, columns, device="cuda", dtype=kwargs["params_dtype"])
        )
        if axis is not None and kwargs["tp_size"] > 1:
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, axis, 1
        kwargs["init_method"](weight)
        return weight

    fp8 = False
    fp8_meta = {"fp8_checkpoint": False}
    fp8_calibration = use_bias = fuse_wgrad_accumulation = False

    def _multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight, self.fuse_wgrad_accumulation)

    def _begin(self, is_first_microbatch: bool | None) -> None:
        self.fp8 = bool(_ENTERED) and _ENTERED[-1] is not None
        assert is_first_microbatch is None or not self.fp8, "FP8 weights of an earlier step would be kept"

    def get_extra_state(self) -> Tensor:
        """As in release 2.20, where recipes without a state have none."""
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


class Linear(_Module):
    """transformer_engine.pytorch.Linear: [..., inputs] -> [..., outputs], with what ranks exchange."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = kwargs["fuse_wgrad_accumulation"]
        self.mode, size = kwargs["parallel_mode"], kwargs["tp_size"]
        self.group, self.shares = kwargs["tp_group"], kwargs["sequence_parallel"] and size > 1
        out_features //= size if self.mode == "column" else 1
        in_features //= size if self.mode == "row" else 1
        axis = {"column": 0, "row": 1}.get(self.mode)
        self.weight = self._weight(out_features, in_features, axis, **kwargs)
        self.bias = None
        if bias:
            self.bias = torch.nn.Parameter(self.weight.new_zeros(out_features))
        self.size, self.returns_bias = size, kwargs["return_bias"]

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        self._begin(is_first_microbatch)
        from megatron.core.tensor_parallel import mappings

        x = inp
        if _ENTERED and _ENTERED[-1] is not None:
            assert x.shape[:-1].numel() % 8 == 0, f"{list(x.shape)} are gathered in FP8"
        if self.mode == "column" and self.shares:
            x = mappings.gather_from_sequence_parallel_region(x, group=self.group)
        elif self.mode == "column" and self.size > 1:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        y = self._multiplied(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        if self.mode == "row" and self.shares:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.group)
        elif self.mode == "row" and self.size > 1:
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=self.group)
        if self.returns_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias


class GroupedLinear(_Module):
    """transformer_engine.pytorch.GroupedLinear: a weight for each expert."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = kwargs["fuse_wgrad_accumulation"]
        assert not bias and kwargs["tp_size"] == 1, "not played here"
        self.num_gemms = num_gemms
        for number in range(num_gemms):
            weight = self._weight(out_features, in_features, None, **kwargs)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        self._begin(is_first_microbatch)
        assert len(m_splits) == self.num_gemms and sum(m_splits) == len(inp)
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        parts = zip(inp.split(m_splits), weights, strict=True)
        return torch.cat([self._multiplied(x, weight) for x, weight in parts])


class _Anything(ModuleType):
    """A module that has a class of every name, but for what later releases have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "autocast":
            raise AttributeError(name)
        vars(self)[name] = type(name, (torch.nn.Module,), {})
        return vars(self)[name]


def _modules() -> dict[str, ModuleType]:
    names = (
        "",
        ".pytorch",
        ".pytorch.fp8",
        ".pytorch.ops",
        ".pytorch.distributed",
        ".common",
        ".common.recipe",
    )
    modules: dict[str, ModuleType] = {
        f"transformer_engine{name}": _Anything(f"transformer_engine{name}") for name in names
    }
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
    modules["transformer_engine"].__version__ = RELEASE  # type: ignore[attr-defined]
    engine, recipes = modules["transformer_engine.pytorch"], modules["transformer_engine.common.recipe"]
    vars(engine).update(Linear=Linear, GroupedLinear=GroupedLinear, fp8_autocast=fp8_autocast)
    vars(modules["transformer_engine.pytorch.fp8"])["fp8_autocast"] = fp8_autocast
    formats = type("Format", (), {"E4M3": "E4M3", "HYBRID": "HYBRID"})
    vars(recipes).update({name: type(name, (Recipe,), {}) for name in RECIPE_CLASSES}, Format=formats)
    return modules


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """megatron-core's classes on these linears, on a GPU with the products of Hopper."""
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine as classes

    modules = _modules()
    sys.modules.update(modules)
    PRODUCTS.clear()
    ADDED.clear()
    with (
        mock.patch.object(utils, "get_te_version", lambda: Version(RELEASE)),
        mock.patch.object(torch.version, "cuda", "12.9"),
    ):
        importlib.reload(classes)
        try:
            yield
        finally:
            for name in modules:
                del sys.modules[name]
    importlib.reload(classes)
