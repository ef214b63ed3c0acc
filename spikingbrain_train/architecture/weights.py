"""What a weight is, without torch: its name, its shape, what it is made of, and how ranks share it.

Parameter counts, FLOPs of matrix products, the conversion from and to Hugging Face checkpoints and what a
dense source does not have are all read from these descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from math import prod

from spikingbrain_train.architecture.initializers import Initializer
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.parallel import ParallelConfig

Shape = tuple[int, ...]

_BY_COLUMNS = (Projection.attention_output.value, Projection.mlp_fc2.value)

ONE_RANK = ParallelConfig()
"""The layout in which one rank holds the whole model."""


class Split(Enum):
    """Over which ranks a weight is split."""

    none = "none"
    """Every rank holds it whole."""
    tensor = "tensor"
    """Tensor-parallel ranks hold equal parts."""
    experts = "experts"
    """Expert-parallel ranks hold whole experts, of which expert-tensor-parallel ranks hold equal parts."""
    whole_experts = "whole experts"
    """Expert-parallel ranks hold whole experts, of which every expert-tensor-parallel rank has a copy."""


@dataclass(frozen=True)
class Copies:
    """Experts made of one dense feed-forward."""

    number: int
    """Experts."""
    routed: bool
    """One copy per expert, along a leading axis; else all side by side in one wide SwiGLU."""
    channel_axis: int
    """Axis of the intermediate channels in the dense tensors: 0 of gate and up projection, 1 of the down
    projection."""
    outputs: float = 1.0
    """How many times the dense output the layer's experts give together as long as they are copies: S + k/N
    of S shared and k of N routed ones, each of which counts with a probability of about 1/N."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a layer, or of the model around its layers."""

    name: str
    """Its key in a Megatron checkpoint below what owns it: ``linear_qkv.weight``."""
    roles: tuple[str, ...]
    """What each Hugging Face tensor that it is made of is; a family's name table spells it."""
    shapes: tuple[Shape, ...]
    """Shape of each of those, in role order."""
    group: str
    """Heading under which the conversion report counts it."""
    split: Split = Split.tensor
    """How ranks share it."""
    layout: str = "rows"
    """How the tensors lie in it: an entry of models/fused_tensors.py."""
    source_shapes: tuple[Shape, ...] | None = None
    """Shapes of the same tensors in a dense source, where they may have fewer heads, which are then copied;
    None where they are ``shapes``."""
    init: Initializer | None = None
    """How it begins where the source does not have it; None for weights that every source has."""
    is_trained: bool = True
    """Whether it learns; else it is a buffer of its module, stored with the weights."""
    reads_input: bool = False
    """Whether it is a matrix that multiplies the layer's normed input."""
    active: tuple[int, int] = (1, 1)
    """Share of it that one token meets, as (k, of n): router_topk of num_experts."""
    copies: Copies | None = None
    """How experts repeat the source's tensors; None for parameters that hold them once."""
    projection: tuple[str, int] | None = None
    """What it projects, as ``Projection`` calls it, and its position among the matrices of that
    projection; None where no linear transform is applied to it."""
    stacked_matrices: int = 1
    """Matrices that each of the tensors holds one above the other: x and z of Mamba's input projection."""
    by_columns: bool = False
    """Whether it is split by columns though it is no projection (see planning/shards.py)."""
    pads_vocabulary: bool = False
    """Whether Megatron may hold more rows than the vocabulary; they are stripped on export."""

    @property
    def is_new(self) -> bool:
        """Whether a dense source does not have it."""
        return self.init is not None

    @cached_property
    def shape(self) -> Shape:
        """Shape over all ranks, without vocabulary padding; [experts, rows, columns] of routed experts."""
        stacked = [sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]]
        if self.copies is None:
            return tuple(stacked)
        if self.copies.routed:
            return (self.copies.number, *stacked)
        stacked[self.copies.channel_axis] *= self.copies.number
        return tuple(stacked)

    @cached_property
    def numel(self) -> int:
        """Elements over all ranks."""
        return prod(self.shape)

    @property
    def active_numel(self) -> int:
        """Elements that one token meets."""
        met, of = self.active
        return self.numel * met // of

    @property
    def matrix_numel(self) -> int:
        """Elements of a matrix that one token is multiplied by: two FLOPs each; 0 for norms and biases."""
        is_matrix = len(self.shapes[0]) == 2 and not self.pads_vocabulary
        return self.active_numel if is_matrix else 0

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix of a hidden layer, or several fused, which Muon updates: a projection."""
        return self.projection is not None and self.is_trained and len(self.shapes[0]) == 2

    @property
    def split_axis(self) -> int:
        """The axis of a matrix along which ranks split it.

        1 of a mixer's output projection and of a feed-forward's second matrix, else 0.
        """
        of_projection = self.projection is not None and self.projection[0] in _BY_COLUMNS
        return 1 if (of_projection or self.by_columns) and len(self.shapes[0]) > 1 else 0

    @property
    def is_split_by_segments(self) -> bool:
        """Whether ranks split each tensor that lies in it for itself: gate and up projection."""
        return self.split_axis == 0 and self.layout == "rows" and len(self.shapes) > 1

    def numel_on_rank(self, parallel: ParallelConfig) -> int:
        """Elements on one rank that holds a part of it."""
        if self.split is Split.none:
            return self.numel
        if self.split is Split.tensor:
            return self.numel // parallel.tensor_model_parallel_size
        experts = parallel.expert_model_parallel_size
        if self.split is Split.experts:
            return self.numel // (experts * parallel.expert_tensor_size)
        assert self.split is Split.whole_experts
        return self.numel // experts

    def matrix_on_rank(self, parallel: ParallelConfig) -> tuple[int, int]:
        """Rows and columns of a matrix on one rank; of one expert, if it is experts'."""
        sizes = list(self.shape[-2:])
        ranks = {
            Split.tensor: parallel.tensor_model_parallel_size,
            Split.experts: parallel.expert_tensor_size,
        }
        sizes[self.split_axis] //= ranks.get(self.split, 1)
        return sizes[0], sizes[1]

    def below(self, prefix: str) -> Weight:
        """The same weight with ``prefix`` in front of its name."""
        # dataclasses.replace takes ten times as long, and a plan with its remedies asks for 10,000 of them.
        moved = object.__new__(Weight)
        vars(moved).update(vars(self), name=prefix + self.name)
        return moved
