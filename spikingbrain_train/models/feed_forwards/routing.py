"""What routers of experts count, whichever kind of feed-forward has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class RouterStatistics:
    """What one router did with this rank's tokens since :meth:`~CountsTokens.reset_statistics`."""

    expert_assignments: Tensor
    """[num_experts] (token, expert) pairs that the router chose, before any was dropped."""
    dropped_assignments: Tensor
    """Pairs that an expert's capacity left out; a scalar."""
    tokens: Tensor
    """Tokens routed; a scalar."""
    aux_loss: Tensor
    """Load-balancing loss of each sequence times its number of tokens; a scalar."""
    z_loss: Tensor
    """Squared log-sum-exp of each token's logits; a scalar."""

    NUM_SCALARS = 4

    @staticmethod
    def unpack(sums: Tensor) -> RouterStatistics:
        """From [..., num_experts + NUM_SCALARS] sums as :class:`CountsTokens` gives them."""
        assignments = sums[..., : -RouterStatistics.NUM_SCALARS]
        dropped, tokens, aux_loss, z_loss = sums[..., -RouterStatistics.NUM_SCALARS :].unbind(-1)
        return RouterStatistics(assignments, dropped, tokens, aux_loss, z_loss)


@runtime_checkable
class CountsTokens(Protocol):
    """A router that counts what it does. All of a model have the same number of experts."""

    if TYPE_CHECKING:
        layer_number: int | None
        """1-based, over the whole decoder; set by the layer that builds it."""

    def reset_statistics(self) -> None:
        """Begin to count from zero."""
        ...

    def statistics(self) -> Tensor:
        """Sums since then: [num_experts + RouterStatistics.NUM_SCALARS], float64."""
        ...


@runtime_checkable
class CountsRankLoad(Protocol):
    """A layer of experts that counts how its tokens are spread over expert-parallel ranks.

    Attributes:
        load_sums: [5] float64, sums over micro-batches: tokens of the busiest rank if every expert were
            computed by its owner, and as they are computed; tokens of a mean rank; copies; micro-batches.
    """

    load_sums: Tensor


@runtime_checkable
class HoldsExperts(Protocol):
    """The experts of a layer that this rank has."""

    def weights_of_experts(self, numbers: Collection[int]) -> Iterator[Parameter]:
        """The weights of those of some experts, by their number over all ranks, that are here.

        Raises ConfigurationError where an expert has no parameters of its own.
        """
        ...


@runtime_checkable
class FollowsSteps(Protocol):
    """A router of which something stored changes from step to step by itself."""

    def step_done(self, step: int) -> None:
        """The step, counted from 1 in its stage, has updated the weights."""
        ...


@runtime_checkable
class HasAuxiliaryLoss(Protocol):
    """A router or an activation that adds losses of its own to what is optimised."""

    auxiliary_metric: str | None
    """Under which name what it adds is reported by itself; None where only the sum of all is."""

    def auxiliary_loss(self) -> Tensor:
        """[] float64, weighted and summed over this rank's tokens (of a router, those that it counts)."""
        ...

    def scale_auxiliary_loss(self, scale: Tensor) -> None:
        """Weigh it by ``scale``, [], from the next forward pass on."""
        ...
