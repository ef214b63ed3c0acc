"""Transformer Engine's autocast for FP8, and whether this machine multiplies FP8 numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from spikingbrain_train.architecture.backends.fp8 import RECIPES, RECIPES_MODULE
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format, Fp8Recipe
from spikingbrain_train.config.parallel import AcceleratorKind, KernelConfig, ParallelLinearBackend
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime.accelerator import Accelerator

_ENGINE = "transformer_engine.pytorch"


def fp8_autocast(format: Fp8Format, recipe: Fp8Recipe) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a context in which Transformer Engine's modules multiply in FP8, one each time.

    Groups of ranks are those of ``delayed`` scales alone, which is why none is given; what tensor-parallel
    ranks share they reduce among themselves.
    """
    engine, recipes = importlib.import_module(_ENGINE), importlib.import_module(RECIPES_MODULE)
    number_format = getattr(recipes.Format, format.name.upper())
    made = getattr(recipes, RECIPES[recipe].recipe_class)(fp8_format=number_format)
    if hasattr(engine, "autocast"):  # 2.9; fp8_autocast warns there
        return lambda: engine.autocast(enabled=True, recipe=made)
    return lambda: engine.fp8_autocast(enabled=True, fp8_recipe=made)


def require_fp8(fp8: Fp8Config, kernels: KernelConfig, accelerator: Accelerator) -> None:
    """Refuse FP8 where this machine does not compute it.

    Args:
        fp8: the run's settings.
        kernels: with linears and experts resolved.
        accelerator: this process's platform and packages.

    Raises:
        PlatformError: the GPU, its torch or the installed Transformer Engine does not have it.
    """
    if fp8.format is None or not accelerator.is_gpu:
        return
    asked, otherwise = f"fp8.format={fp8.format.value}", "set fp8.format=null"
    if accelerator.kind is not AcceleratorKind.cuda:
        raise PlatformError(
            f"{asked} needs an NVIDIA GPU, but this is {accelerator.device_name}; {otherwise}"
        )
    needs = RECIPES[fp8.recipe]
    recipe = f"{asked} with fp8.recipe={fp8.recipe.value}"
    missing = needs.missing(torch.cuda.get_device_capability(), torch.version.cuda)
    if missing is not None:
        others = [
            other.value
            for other, its in RECIPES.items()
            if its.missing(torch.cuda.get_device_capability(), torch.version.cuda) is None
        ]
        choose = f"choose fp8.recipe={' or '.join(others)}, or {otherwise}" if others else otherwise
        raise PlatformError(f"{recipe} needs {missing}; {choose}")
    if kernels.parallel_linear is not ParallelLinearBackend.transformer_engine:
        raise PlatformError(
            f"{asked} needs Transformer Engine's linears on GPUs, but those of this run are "
            f"cluster.kernels.parallel_linear={kernels.parallel_linear.value}; install "
            f"transformer-engine[pytorch] and choose transformer_engine or auto, or {otherwise}"
        )
    if not accelerator.machine().defines(f"{RECIPES_MODULE}:{needs.recipe_class}"):
        raise PlatformError(
            f"{recipe} needs Transformer Engine {needs.release} or later, with {needs.recipe_class}, but "
            f"{accelerator.packages.get('transformer_engine', 'another one')} is installed; update it, or "
            f"{otherwise}"
        )
