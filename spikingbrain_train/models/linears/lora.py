"""Linears with low-rank adapters beside their weight (LoRA, arXiv 2106.09685, eq. 3), several at once.

The sum over adapters of ``weight * alpha / rank * B A x`` is added to what the linear gives. q, k and v, and
gate and up projection, lie in one weight, but each has factors of its own, as in every export.

What ranks hold, and what they tell each other, letters as in the paper:

- Column-parallel: all have A, and the rows of B that are theirs. Of ``A x`` every rank needs the whole
  gradient, which is summed over them; under sequence parallelism each computes ``A x`` of its share of the
  sequence, which is gathered, and gradients of A are summed as those of norms are.
- Row-parallel: all have B, and the columns of A that are theirs. ``A x`` is summed over them; under sequence
  parallelism each gets the sum for its share of the sequence, and gradients of B are summed.
- Experts, whose dispatcher sums outputs and gradients of inputs over the ranks that share an expert out, sum
  the gradient of the factor that all of them have.

So what is sent is rank numbers a token, where the linear itself sends the hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.nn.functional import dropout, linear

from spikingbrain_train.architecture.lora import targets_of_linear
from spikingbrain_train.config.lora import LoraTarget
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.linears.linear_transform import LinearTransform


class LoraAdapters(LinearTransform):
    """All adapters of one linear.

    Attributes:
        weights: of each adapter in the sum by its name; 0 switches it off.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._settings = model.lora
        self.weights = {name: model.lora.weight(name) for name in model.lora.names}

    def attach(self, linear: Any) -> None:
        """Give a linear A and B of every matrix in it and adapter: ``lora.q_proj.<adapter>_A``."""
        self._linear, self._rows = linear, dict[LoraTarget, int]()
        targets = targets_of_linear(linear.projection, linear.roles)
        if not set(targets) & set(self._settings.target_modules):
            return
        if getattr(linear, "weight", None) is None:
            raise ConfigurationError(
                "model.lora.names has adapters in experts, but cluster.kernels.experts multiplies all of "
                "them at once; set cluster.kernels.experts=sequential"
            )
        self._group = linear.tensor_parallel_group()
        weight = linear.weight
        parts = [weight] if linear.joined is None else list(linear.joined.parts(weight))
        rows = [part.numel() // weight.shape[1] for part in parts]
        self._rows = dict(zip(targets, rows, strict=True))
        linear.add_module("lora", torch.nn.Module())
        for target, number in self._rows.items():
            if target in self._settings.target_modules:
                factors = torch.nn.Module()
                linear.lora.add_module(target.value, factors)
                for name in self._settings.names:
                    self._add(factors, target, name, number, weight)

    def _add(
        self, factors: torch.nn.Module, target: LoraTarget, name: str, rows: int, weight: Tensor
    ) -> None:
        rank, row_parallel = self._settings.rank(name), self._linear.row_parallel
        shapes = {"A": (rank, weight.shape[1]), "B": (rows, rank)}
        for letter, shape in shapes.items():
            parameter: Any = torch.nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            is_split = (letter == "A") == row_parallel
            axis = (1 if row_parallel else 0) if is_split else None
            if axis is not None:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            parameter.allreduce = getattr(weight, "allreduce", True)
            parameter.is_new_parameter = False
            parameter.sequence_parallel = axis is None and self._linear.splits_sequence
            factors.register_parameter(f"{name}_{letter}", parameter)
            self._linear.split_axes[f"lora.{target.value}.{name}_{letter}"] = axis

    def output(self, output: Tensor, x: Tensor) -> Tensor:
        """``output`` and what the adapters make of ``x``."""
        active = [name for name, weight in self.weights.items() if weight != 0]
        if not active or not self._rows:
            return output
        pairs = [
            (target, name)
            for target in self._rows
            if target in self._settings.target_modules
            for name in active
        ]
        inner = [linear(self._dropped(x), self._shared(target, name, "A")) for target, name in pairs]
        widths = [each.shape[-1] for each in inner]
        between = self._between(torch.cat(inner, dim=-1)).split(widths, dim=-1)
        added: dict[LoraTarget, Tensor] = {}
        for (target, name), z in zip(pairs, between, strict=True):
            scale = self.weights[name] * self._settings.alpha(name) / self._settings.rank(name)
            one = scale * linear(z, self._shared(target, name, "B"))
            added[target] = one if target not in added else added[target] + one
        if len(self._rows) == 1:
            return output + next(iter(added.values()))
        parts = [
            added[target] if target in added else output.new_zeros(*output.shape[:-1], rows)
            for target, rows in self._rows.items()
        ]
        return output + self._linear.joined.join(parts)

    def _dropped(self, x: Tensor) -> Tensor:
        share = self._settings.dropout
        if share == 0 or not self._linear.training:
            return x
        if self._linear.row_parallel or self._linear.splits_sequence:  # other numbers on every rank
            with get_cuda_rng_tracker().fork():
                return dropout(x, share)
        return dropout(x, share)

    def _between(self, z: Tensor) -> Tensor:
        """``A x`` of all adapters as B reads it; what ranks have to tell each other is told here."""
        at, group = self._linear, self._group
        if group.size() == 1 or at.is_of_expert:
            return z
        if at.row_parallel and at.splits_sequence:
            return reduce_scatter_to_sequence_parallel_region(z, group=group)
        if at.row_parallel:
            return reduce_from_tensor_model_parallel_region(z, group=group)
        if at.splits_sequence:
            return gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(z, group=group)

    def _shared(self, target: LoraTarget, name: str, letter: str) -> Tensor:
        """A factor; one that ranks of an expert all hold has the sum of their gradients."""
        factor = getattr(getattr(self._linear.lora, target.value), f"{name}_{letter}")
        axis = self._linear.split_axes[f"lora.{target.value}.{name}_{letter}"]
        if self._linear.is_of_expert and self._group.size() > 1 and axis is None:
            return copy_to_tensor_model_parallel_region(factor, group=self._group)
        return factor
