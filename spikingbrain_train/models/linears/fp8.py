"""Parallel linears that multiply in FP8 while they train.

On GPUs Transformer Engine's own, each called within its autocast. megatron-core enters that around whole
layers; entered around each linear it reaches the same products, and it is there again where a layer is
computed once more for the backward pass, in whatever way. Recipes whose scales are those of the numbers at
hand keep nothing between calls, so that it does not matter how often it is entered.

On CPUs megatron-core's, whose products :mod:`spikingbrain_train.ops.fp8` computes. What ranks share, as in
Transformer Engine: tensors that tensor-parallel ranks gather or have whole are rounded as whole ones, a
rank's part of a weight, of a row-parallel linear's input or of a context-parallel sequence with scales of
its own.

Outside of training (``eval()``) both compute what they are derived from: bf16, at any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from spikingbrain_train.architecture.backends.fp8 import RECIPES
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format, Fp8Recipe
from spikingbrain_train.config.parallel import ParallelLinearBackend
from spikingbrain_train.ops.fp8 import Rounding, fp8_linear, rounding_of
from spikingbrain_train.runtime.fp8 import fp8_autocast


class ComputedFp8Linear(torch.nn.Module):
    """In front of a parallel linear of megatron-core: its products are computed as FP8 ones.

    Attributes:
        rounding: formats and scales.
    """

    rounding: Rounding

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
        """megatron-core's product and what ranks exchange around it: [..., inputs] -> [..., outputs]."""
        if not self.training:
            return super()._forward_impl(input, weight, *args, **settings)  # type: ignore[misc]
        assert not args and not settings["gradient_accumulation_fusion"], "a product of another form"
        group = settings["tp_group"]
        if settings["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        elif settings["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=group)
        output, bias = fp8_linear(input, weight, self.rounding), settings["bias"]
        return output if bias is None else output + bias


class Fp8Linear(torch.nn.Module):
    """In front of a parallel linear of Transformer Engine, single or grouped: it multiplies in FP8.

    Attributes:
        autocast: makes a context in which it does.
        multiple: what has to divide the tokens of a product.
    """

    autocast: Callable[[], AbstractContextManager[Any]]
    multiple: int

    def get_extra_state(self) -> Tensor:
        """What FP8 carries from step to step: nothing. (Earlier releases wait for the GPU to say so.)"""
        return torch.empty(0, dtype=torch.uint8)

    def _split_extra_state(self, state: Tensor) -> list[Tensor]:
        """The same of each expert; megatron-core's looks for more where linears have multiplied in FP8."""
        return [state] * self.num_gemms  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The linear's own forward pass.

        Args:
            x: [..., tokens, width]; of experts [tokens, width], filled up with rows of zeros, which change no
                scale and no gradient.
            args: further ones are the linear's: how many tokens each expert has, where it is grouped.
            kwargs: as well.
        """
        if not self.training:
            return super().forward(x, *args, **kwargs)
        if x.dim() > 2:  # the tokens of a micro-batch: planning/fp8_checks.py
            with type(self).autocast():
                return super().forward(x, *args, **kwargs)
        sizes = [int(size) for size in args[0]] if args else [len(x)]
        filled = [-(-size // self.multiple) * self.multiple for size in sizes]
        if len(x) == 0 or filled == sizes:
            # Without a token there is nothing to multiply; Transformer Engine gives weights a gradient of 0.
            with type(self).autocast():
                return super().forward(x, *args, **kwargs)
        pieces = [
            torch.nn.functional.pad(piece, (0, 0, 0, more - len(piece)))
            for piece, more in zip(x.split(sizes), filled, strict=True)
        ]
        args = (filled, *args[1:]) if args else ()
        with type(self).autocast():
            output, *bias = super().forward(torch.cat(pieces), *args, **kwargs)
        kept = [piece[:size] for piece, size in zip(output.split(filled), sizes, strict=True)]
        return (torch.cat(kept), *bias)


def in_fp8(linear_class: type, fp8: Fp8Config, backend: ParallelLinearBackend) -> type:
    """The class of linears that multiply in FP8; one and the same for the same arguments.

    Args:
        linear_class: a parallel linear of megatron-core or Transformer Engine, plain or grouped.
        fp8: formats and scales.
        backend: whose class it is.
    """
    assert fp8.format is not None, "no FP8 format"
    return _in_fp8(linear_class, fp8.format, fp8.recipe, backend)


@cache
def _in_fp8(linear_class: type, format: Fp8Format, recipe: Fp8Recipe, backend: ParallelLinearBackend) -> type:
    attributes: dict[str, Any] = {"__doc__": linear_class.__doc__}
    if backend is ParallelLinearBackend.megatron:
        base: type = ComputedFp8Linear
        attributes["rounding"] = rounding_of(format, recipe)
    else:
        assert backend is ParallelLinearBackend.transformer_engine, f"{backend} has no FP8 linears"
        base = Fp8Linear
        attributes["autocast"] = staticmethod(fp8_autocast(format, recipe))
        attributes["multiple"] = RECIPES[recipe].multiple
    return type(f"Fp8{linear_class.__name__}", (base, linear_class), attributes)
