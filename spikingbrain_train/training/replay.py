"""A step that is computed twice tells trouble that comes back from trouble that does not.

What comes back is in the data or in the weights (or in hardware that is wrong every time, which looks the
same). What does not is the hardware's, or comes of sums whose order changes from one time to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.training.stages.losses import StepLosses

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_NAMED = 8


@dataclass(frozen=True)
class Computed:
    """What one rank has computed of a step, bit by bit."""

    losses: tuple[int, ...]
    """Its own sums."""
    gradients: int
    """A checksum of its gradients, which other ranks' are summed into."""
    is_finite: bool
    """Whether its own sums are."""

    @classmethod
    def of(cls, losses: StepLosses, gradients: Iterable[Tensor]) -> Computed:
        """Read it where it lies; the host waits."""
        sums = losses.sums
        bits = sums.view(torch.int64).tolist()
        return cls(tuple(bits), _checksum(gradients), bool(sums.isfinite().all()))


def _checksum(gradients: Iterable[Tensor]) -> int:
    total: Tensor | None = None
    for gradient in gradients:
        bits = gradient.flatten().view(_INTEGER[gradient.element_size()]).sum(dtype=torch.int64)
        total = bits if total is None else total * 31 + bits  # whole numbers wrap around
    return 0 if total is None else int(total)


@dataclass(frozen=True)
class Verdict:
    """What computing a bad batch once more has shown; the same on every rank."""

    is_bad_again: bool
    suspected: tuple[int, ...]
    """Ranks whose second result is another one; empty where it is not known, or the trouble came back."""
    is_exact: bool
    """Whether every bit was compared."""

    def describe(self) -> str:
        """In words behind "computed again, "."""
        if self.is_bad_again and not self.suspected:
            same = "it is the same to the last bit" if self.is_exact else "it is as bad"
            return f"{same}: the data or the weights"
        what = "it is as bad, but not the same" if self.is_bad_again else "it is good"
        return f"{what}: hardware or nondeterminism suspected{named(self.suspected)}"


def compare(
    first: Computed, second: Computed, groups: ProcessGroups, *, is_bad_again: bool, is_exact: bool
) -> Verdict:
    """Hold both results of every rank against each other; a collective of all ranks.

    Args:
        first: of this rank.
        second: the same batch, computed once more.
        groups: process groups.
        is_bad_again: whether the second is bad on any rank.
        is_exact: whether equal inputs give equal bits here; else only what was NaN or infinite is compared.
    """
    pairs: list[tuple[Computed, Computed]] = [(first, second)] * groups.world_size
    torch.distributed.all_gather_object(pairs, (first, second))
    if is_bad_again and not is_exact:
        return Verdict(True, (), is_exact)
    # A rank's own sums say where it began; gradients and what ranks exchange carry it on to others.
    signs: list[Sequence[bool]] = [[one.losses != two.losses for one, two in pairs]]
    if not is_exact:
        signs = [[one.is_finite < two.is_finite for one, two in pairs]]
    signs.append([one.gradients != two.gradients for one, two in pairs])
    # Where all have it, it says nothing of where it began.
    ranks = next((found for sign in signs if 0 < len(found := _ranks(sign)) < max(2, groups.world_size)), ())
    return Verdict(is_bad_again, ranks, is_exact)


def _ranks(signs: Sequence[bool]) -> tuple[int, ...]:
    return tuple(rank for rank, sign in enumerate(signs) if sign)


def named(ranks: Sequence[int]) -> str:
    """`` on rank 3``, `` on ranks 1, 3``, or nothing."""
    if not ranks:
        return ""
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MOST_NAMED]))}{more}"
