"""The matrices of hidden layers, one by one, however parameters fuse them and ranks share them.

A parameter is what its description says (``architecture/weights.py``): q, k and v by query groups, gate and
up projection one behind the other, x and z of Mamba row by row. Each of those is a matrix of its own here.
Shared experts are one wide feed-forward; every routed expert has matrices of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.weights import Shape, Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.fused_tensors import Transform, transform_of
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks

# What modules call the parameters of routed experts: one after the other, and Transformer Engine's.
_ONE_EXPERT = re.compile(r"\bexperts\.local_experts\.\d+\.")
_GROUPED_EXPERT = re.compile(r"\bexperts\.(linear_fc[12]\.weight)\d+$")


@dataclass(frozen=True)
class HiddenMatrix:
    """A parameter of a hidden layer that is a matrix, or several.

    Letters: the parameter is [rows, columns] over all tensor-parallel ranks.
    """

    weight: Weight
    shapes: tuple[Shape, ...]
    """Of the tensors that lie in it, over all ranks."""
    transform: Transform
    """How they lie in it."""
    model: ModelConfig
    group: ProcessGroup | None
    """The ranks that hold its parts; None where this one holds it whole."""

    def apply(self, local: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of every matrix, where each may lie on several ranks; a collective of those.

        Args:
            local: this rank's part of the parameter, or of what has its shape.
            function: of a matrix [rows, columns], to one of the same shape; every rank computes it.

        Returns:
            This rank's part of the results, in the shape of ``local``.
        """
        number = self.weight.stacked_matrices
        tensors = [
            torch.cat([function(matrix) for matrix in tensor.chunk(number)])
            for tensor in self.transform.split(self._gathered(local), list(self.shapes), self.model)
        ]
        return self._own(self.transform.fuse(tensors, self.model))

    def _segments(self, rows: int) -> list[int]:
        """Rows that are split over ranks each for themselves, of so many."""
        if self.weight.is_split_by_segments:
            whole = sum(shape[0] for shape in self.shapes)
            return [shape[0] * rows // whole for shape in self.shapes]
        return [rows]

    def _gathered(self, local: Tensor) -> Tensor:
        """[rows, columns]."""
        if self.group is None:
            return local
        parts = [torch.empty_like(local) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, local.contiguous(), group=self.group)
        if self.weight.split_axis == 1:
            return torch.cat(parts, dim=1)
        segments = [part.split(self._segments(len(part))) for part in parts]
        return torch.cat([rows for segment in zip(*segments, strict=True) for rows in segment])

    def _own(self, whole: Tensor) -> Tensor:
        """Undo :meth:`_gathered`."""
        if self.group is None:
            return whole
        number, rank = self.group.size(), self.group.rank()
        if self.weight.split_axis == 1:
            return whole.chunk(number, dim=1)[rank]
        segments = whole.split(self._segments(len(whole)))
        return torch.cat([segment.chunk(number)[rank] for segment in segments])


def hidden_matrices(
    network: HybridGPTModel | ModelChunks,
) -> Iterator[tuple[torch.nn.Parameter, HiddenMatrix]]:
    """This rank's parameters that are matrices of hidden layers: the projections of mixers and feed-forwards.

    Embeddings, output layers, routers, adapters, convolutions, and what says how states decay are none.

    Raises:
        ConfigurationError: modules keep matrices in a form that is not described.
    """
    model = network.model_config
    described = layers(model)
    for layer in network.layers:
        weights = {
            weight.name: weight
            for weight in described[layer.layer_number - 1].weights(model)
            if weight.is_hidden_matrix
        }
        found = set()
        for name, parameter in layer.named_parameters():
            name = _ONE_EXPERT.sub("experts.experts.", name)
            name = _GROUPED_EXPERT.sub(r"experts.experts.\1", name)
            if name in weights:
                found.add(name)
                yield parameter, _hidden_matrix(weights[name], model)
        if missing := weights.keys() - found:
            raise ConfigurationError(
                f"optimizer.kind=muon finds no matrices {', '.join(sorted(missing))} in layer "
                f"{layer.layer_number - 1}: experts of grouped_gemm lie transposed in one parameter; set "
                f"cluster.kernels.experts=sequential, or transformer_engine where that is installed"
            )


def _hidden_matrix(weight: Weight, model: ModelConfig) -> HiddenMatrix:
    shapes = weight.shapes
    if weight.copies is not None and not weight.copies.routed:  # side by side in one wide feed-forward
        axis, number = weight.copies.channel_axis, weight.copies.number
        shapes = tuple(
            tuple(size * number if dim == axis else size for dim, size in enumerate(shape))
            for shape in shapes
        )
    return HiddenMatrix(weight, shapes, transform_of(weight), model, _ranks_of(weight))


def _ranks_of(weight: Weight) -> ProcessGroup | None:
    """Those that hold parts of it, None where this one holds it whole."""
    if weight.split is Split.tensor:
        group = parallel_state.get_tensor_model_parallel_group()
    elif weight.split is Split.experts:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        return None
    return group if group.size() > 1 else None
