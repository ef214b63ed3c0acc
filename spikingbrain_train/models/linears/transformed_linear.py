"""Linears whose input or weight is transformed: subclasses of the plain parallel linears.

Several transforms of one linear are applied in order. What each of them is told of the split:

- Column-parallel linears see whole tokens, under sequence parallelism those of this rank's share of the
  sequence, and a gather of the input that follows moves transformed values. Their weight's rows are split.
- Row-parallel linears see a part of every token's channels, and their weight's columns are split.
- q, k and v lie in one weight, and so do gate and up projection: which rows are whose
  (:mod:`spikingbrain_train.models.linears.joined_rows`).
- Experts have a tensor-parallel group of their own, and grouped linears a weight for each expert.

A transformed weight takes the parameter's place under its name while the plain linear's forward pass runs, so
that any class that reads ``self.weight`` multiplies by it. The parameter itself stays where it is: its name,
``sharded_state_dict``, checkpoints, and the buffers in which data parallelism and the optimizer keep its
gradient (``main_grad``) are the plain linear's. Its gradient arrives through autograd; adding it up inside
the matrix product would pass the transform by (:mod:`spikingbrain_train.models.weight_gradients`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.models.linears.joined_rows import RowsOf
from spikingbrain_train.models.linears.linear_transform import HasTransforms, LinearTransform, Shard
from spikingbrain_train.models.split_parameters import sharded_axes

_WEIGHT = re.compile(r"weight\d*")  # grouped linears number theirs


class TransformedLinear(HasTransforms, torch.nn.Module):
    """What :func:`transformed` adds to a linear class.

    Attributes:
        transforms: what is done to this linear, in order, by the names of their kinds.
        row_parallel: the input is split over tensor-parallel ranks.
        weight_split_axis: the axis of the weight that is; None where every rank holds all of it.
        projection: what the linear projects, as :class:`Projection` calls it.
        roles: what the matrices in its weight are, as its description has them; () are those of attention
            and feed-forwards.
        in_front: the transforms whose input is what travels to the linear, by the names of their kinds.
        joined: the matrices whose rows lie in the weight, where there are several.
        is_of_expert: it is part of a routed expert.
        splits_sequence: column-parallel inputs and row-parallel outputs are a share of the sequence.
        split_axes: of parameters that transforms have given the linear, by name, the axis that
            tensor-parallel ranks share out; None where every rank holds all of it.
    """

    make_transforms: Callable[[], dict[str, LinearTransform]]
    rows_of: RowsOf
    row_parallel: bool
    weight_split_axis: int | None
    projection: str
    roles: tuple[str, ...]
    in_front: frozenset[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = [value for value in (*args, *kwargs.values()) if isinstance(value, ModelParallelConfig)]
        assert settings, f"{type(self).__name__} is built without megatron-core's config"
        self.joined = type(self).rows_of(cast(TransformerConfig, settings[0]))
        self.is_of_expert = bool(kwargs.get("is_expert", False))
        # The token dispatcher gives all ranks of an expert's tensor-parallel group the same tokens.
        self.splits_sequence = settings[0].sequence_parallel and not self.is_of_expert
        self.split_axes: dict[str, int | None] = {}
        self.transforms = type(self).make_transforms()
        for transform in self.transforms.values():
            transform.attach(self)
        self._of_weight = [each for each in self.transforms.values() if each.changes_weight()]
        self._of_output = [each for each in self.transforms.values() if each.changes_output()]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The linear's own forward pass on what the transforms make of its input and weight.

        Args:
            input_: [..., input_size], or this rank's part of it for a row-parallel linear.
            args: further ones are the linear's.
            kwargs: as well.
        """
        given = input_
        for name, transform in self.transforms.items():
            input_ = transform.input(input_, self.input_shard)
            if name in self.in_front:
                given = input_
        with self.transformed_weights():
            result = super().forward(input_, *args, **kwargs)
        for transform in self._of_output:
            output, *bias = result
            result = (transform.output(output, given), *bias)
        return result

    @property
    def transforms_weight(self) -> bool:
        """Whether it multiplies by something else than its parameter."""
        return bool(self._of_weight)

    @contextmanager
    def transformed_weights(self) -> Iterator[None]:
        """While it lasts, ``weight`` is what the transforms make of it."""
        # An attribute of the object itself is found before torch looks for a parameter of that name.
        names = [name for name in self._parameters if _WEIGHT.fullmatch(name)] if self._of_weight else []
        attributes = self.__dict__
        try:
            for name in names:
                weight: Any = self._parameters[name]
                if weight is None:
                    continue
                for transform in self._of_weight:
                    weight = transform.weight(weight, self._weight_shard)
                attributes[name] = weight
            yield
        finally:
            for name in names:
                attributes.pop(name, None)

    @cached_property
    def input_shard(self) -> Shard:
        """Which part of the whole tokens this rank's input is."""
        # megatron-core's RowParallelLinear can also be built to split a whole input itself.
        is_split = self.row_parallel and getattr(self, "input_is_parallel", True)
        is_copy = not is_split and not self.splits_sequence
        return Shard(self.tensor_parallel_group(), -1 if is_split else None, is_copy)

    @cached_property
    def _weight_shard(self) -> Shard:
        axis = self.weight_split_axis
        return Shard(self.tensor_parallel_group(), axis, is_copy=axis is None, joined=self.joined)

    def tensor_parallel_group(self) -> ProcessGroup:
        """The ranks that share its weight out; of experts their own."""
        # Transformer Engine's own tp_group is None for experts; megatron-core keeps the real one beside it.
        group = getattr(self, "_tp_group", None) or getattr(self, "tp_group", None)
        return get_tensor_model_parallel_group_if_none(group, is_expert=self.is_of_expert)


class StoredTransformedLinear(TransformedLinear):
    """A :class:`TransformedLinear` that says where its parameters lie in a checkpoint, as its class does."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The linear's own, and what its transforms have given it: see :attr:`split_axes`."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        given = {name: value for name, value in self.named_parameters() if name in self.split_axes}
        if given:
            sharded |= sharded_axes(
                given, self.split_axes, prefix, sharded_offsets, self.tensor_parallel_group(), metadata
            )
        return sharded


def transformed(
    linear_class: type,
    make_transforms: Callable[[], dict[str, LinearTransform]],
    *,
    rows_of: RowsOf = lambda config: None,
    row_parallel: bool = False,
    weight_split_axis: int | None = None,
    projection: str = "",
    roles: tuple[str, ...] = (),
    in_front: frozenset[str] = frozenset(),
) -> type:
    """A subclass of a linear class that transforms its input and weight.

    Args:
        linear_class: a parallel linear of megatron-core or Transformer Engine (single or grouped), or any
            module that is built with megatron-core's config, whose ``forward`` takes the input first and
            reads its parameter ``weight`` (``weight0``, ``weight1``, ... if it is grouped) from itself.
        make_transforms: what is done to one linear, in order, by the names of their kinds.
        rows_of: the matrices whose rows lie in its weight, by default one.
        row_parallel: the input is split over tensor-parallel ranks.
        weight_split_axis: the axis of the weight that is.
        projection: what the linear projects.
        roles: what the matrices in its weight are, where they are not attention's or a feed-forward's.
        in_front: names of the transforms whose input is what travels to the linear.
    """
    attributes = {
        "projection": projection,
        "roles": roles,
        "in_front": in_front,
        "make_transforms": staticmethod(make_transforms),
        "rows_of": staticmethod(rows_of),
        "row_parallel": row_parallel,
        "weight_split_axis": weight_split_axis,
        "__doc__": linear_class.__doc__,
    }
    is_stored = hasattr(linear_class, "sharded_state_dict")
    base = StoredTransformedLinear if is_stored else TransformedLinear
    return type(f"Transformed{linear_class.__name__}", (base, linear_class), attributes)
