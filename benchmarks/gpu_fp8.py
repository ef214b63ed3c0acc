"""Claim: on GPUs with FP8 products the linears of a layer as wide as the 7B take less time in FP8.

Forward and backward of one linear after the other, as a run builds them: Transformer Engine's in FP8 with
each recipe that the GPU has, the same in bf16, and cuBLAS by F.linear. What FP8 takes beside products, to
find scales and to round, is in its time. Contenders take turns in one process, best of the repeats, timed by
CUDA events.

benchmarks/gpu.py measures it (pieces fp8-8k and step-7b-8k-fp8); it needs a GPU with FP8 products and
Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_ops import OURS, Contenders, built_layer
from spikingbrain_train.architecture.backends.fp8 import RECIPES
from spikingbrain_train.config.fp8 import Fp8Recipe
from spikingbrain_train.errors import PlatformError

LINEARS = {
    "q, k and v": "self_attention.linear_qkv",
    "attention output": "self_attention.linear_proj",
    "gate and up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}
"""Of a layer; what the model calls them."""


def recipes(device: str) -> list[Fp8Recipe]:
    """Those that the GPU has, the default first; on the CPU, which computes them all, that alone.

    Raises PlatformError where the GPU has none.
    """
    if device == "cpu":
        return [Fp8Recipe.tensorwise]
    capability, cuda = torch.cuda.get_device_capability(), torch.version.cuda
    found = [recipe for recipe in Fp8Recipe if RECIPES[recipe].missing(capability, cuda) is None]
    if not found:
        raise PlatformError(f"{torch.cuda.get_device_name()} has no FP8 products, which this piece measures")
    return found


def products(T: int, linear: str, model: str = "spikingbrain_7b", device: str = "cuda") -> Contenders:
    """A linear in FP8 with each recipe, in bf16, and cuBLAS, on the same numbers.

    Args:
        T: tokens.
        linear: a name in :data:`LINEARS`.
        model: a name of conf/model.
        device: ``cuda``, or ``cpu`` to try it at small size.
    """
    found: Contenders = {}
    first, *others = recipes(device)
    for name, recipe in {
        OURS: first,
        **{f"FP8, {each.value}": each for each in others},
        "bf16": None,
    }.items():
        module = built_layer(model, device, recipe).get_submodule(LINEARS[linear])
        if not found:
            weight = module.get_parameter("weight").detach()
            x = torch.randn(T, 1, weight.shape[1], device=device, dtype=weight.dtype)
        found[name] = (_call(module), [x, weight])
    found["cuBLAS, F.linear"] = (F.linear, [x, weight])
    return found


def _call(module: torch.nn.Module) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))[0]
        return output

    return call


CASES: dict[str, Callable[[int], Contenders]] = {
    f"{name}, FP8": partial(products, linear=name) for name in LINEARS
}
"""What is timed; ours is FP8 with the first recipe."""
