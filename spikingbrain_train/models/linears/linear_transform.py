"""What a transform of linears is to torch: functions of an input and of a weight, right under any split.

A kind (:mod:`spikingbrain_train.architecture.linear_transforms`) names the class; every linear that it is
applied to has an object of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from spikingbrain_train.models.linears.joined_rows import JoinedRows
from spikingbrain_train.reporting.progress import Shown


@dataclass(frozen=True)
class Shard:
    """What a rank's tensor is of the whole one, whose parts or copies the ranks of a group hold."""

    group: ProcessGroup
    """The linear's tensor-parallel ranks; of experts their own."""
    axis: int | None
    """The axis that is split over the group, -1 for the channels of an input; None where it is whole."""
    is_copy: bool
    """Whether every rank of the group holds the same."""
    joined: JoinedRows | None = None
    """Of a weight: the matrices whose rows lie in it, where there are several."""

    @property
    def parts(self) -> int:
        """Parts of the whole tensor."""
        return 1 if self.axis is None else int(self.group.size())

    @property
    def counts_here(self) -> bool:
        """Whether this rank counts its tensor, so that summed over all ranks everything counts once."""
        return not self.is_copy or self.group.rank() == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """Numbers that were added up over this rank's part, added up over the whole, in place.

        An expert without tokens has none on every rank of its group: an empty tensor talks to nobody.

        Args:
            numbers: any shape and dtype, contiguous; without a gradient.
        """
        return self._reduce(numbers, ReduceOp.SUM)

    def max(self, numbers: Tensor) -> Tensor:
        """As :meth:`sum`, for maxima."""
        return self._reduce(numbers, ReduceOp.MAX)

    def _reduce(self, numbers: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        if self.parts > 1 and numbers.numel() > 0:
            torch.distributed.all_reduce(numbers, op=op, group=self.group)
        return numbers


class TransformStatistics(ABC):
    """What is counted of all linears of a model that one kind of transform is applied to."""

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """Any shape; those of several ranks are combined by adding them up in place."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What follows from the counts: ``<name of the kind>/<metric>``, of a layer ``.../layer_<n>``."""


class HasTransforms:
    """A module with transforms of its own, which schedules and statistics reach."""

    transforms: dict[str, LinearTransform]
    """In order, by the names of their kinds."""


class LinearTransform:
    """What is done to one linear; here nothing is.

    An object holds no parameters: weights, their names and checkpoints are those of the plain linear, and
    what a kind stores beside them (``stored_beside``) is given to the linear in :meth:`attach`. What the
    kind's ``schedule`` sets are attributes of it.

    Attributes:
        statistics: counts, while somebody collects them; add to them in :meth:`input` or :meth:`weight`, on
            ranks where the shard says ``counts_here``.
        counts_few_tokens: whether :meth:`input` asks :meth:`counted` which tokens to count, so that steps of
            training are counted, too, at little cost; else evaluations alone are.
        tokens_to_count: how many more tokens of :meth:`input` shall be counted; None counts all. See
            :meth:`counted`.
        shown: how the progress line shows what the schedule sets and the statistics say, if it does.
    """

    statistics: TransformStatistics | None = None
    counts_few_tokens = False
    tokens_to_count: int | None = None
    shown: Mapping[str, Shown] = {}

    def counted(self, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        """The tokens of an input that the statistics are of: all, or a few that are spread over it.

        Args:
            of_tokens: tensors [..., width], each of any width, over the same tokens.

        Returns:
            Each as [tokens, width]; without tokens where enough were counted before.
        """
        flat = tuple(each.reshape(-1, each.shape[-1]) for each in of_tokens)
        if self.tokens_to_count is None:
            return flat
        tokens, wanted = len(flat[0]), self.tokens_to_count
        step = max(1, tokens // max(1, wanted))
        chosen = tuple(each[::step][:wanted] for each in flat)
        self.tokens_to_count -= len(chosen[0])
        return chosen

    def attach(self, linear: torch.nn.Module) -> None:
        """Called once, when the linear has been built.

        Parameters that it gets here stand in the linear's ``split_axes``, which checkpoints follow.
        """

    def input(self, x: Tensor, shard: Shard) -> Tensor:
        """What the linear multiplies its weight by.

        Args:
            x: [..., input_size], or this rank's part of it for a row-parallel linear.
            shard: which part of the whole tokens that is.

        Returns:
            The same shape and dtype, with a gradient to ``x``.
        """
        return x

    def weight(self, weight: Tensor, shard: Shard) -> Tensor:
        """What the linear multiplies its input by. Called in every forward pass, also under recomputation.

        Args:
            weight: [output, input] parameter, or this rank's part of it; of grouped linears each expert's.
            shard: which part of the whole matrix that is.

        Returns:
            The same shape and dtype, with a gradient to ``weight``.
        """
        return weight

    def output(self, output: Tensor, x: Tensor) -> Tensor:
        """What the linear gives out, without its bias where megatron-core returns that apart.

        Args:
            output: what the weight made of the input, summed over ranks as the linear does it.
            x: the input as it came to the linear: spikes, if it reads some, and else what no transform has
                changed.

        Returns:
            The same shape and dtype as ``output``, with gradients to both.
        """
        return output

    @classmethod
    def new_statistics(cls, device: torch.device) -> TransformStatistics | None:
        """Empty counts on ``device``; None where nothing is counted."""
        return None

    @classmethod
    def changes_weight(cls) -> bool:
        """Whether :meth:`weight` does anything."""
        return cls.weight is not LinearTransform.weight

    @classmethod
    def changes_output(cls) -> bool:
        """Whether :meth:`output` does anything."""
        return cls.output is not LinearTransform.output
