"""Which heads, and with them which groups, a rank gets under Ulysses. Pure Python: no torch.

Heads are shared out in order and as evenly as whole heads allow, rank r of P gets heads ``r * H // P`` to
``(r + 1) * H // P``; with them travel only the groups of keys and values (in linear attention also of gates)
that these heads read:

- P divides G: every rank gets G / P groups; nothing is sent twice.
- G divides P: every rank gets one group, P / G ranks the same one, and shares its heads with them.
- otherwise a group whose heads lie on two ranks goes to both.

Where heads don't divide (7 heads of a group on 2 ranks: 3 and 4; 28 heads on 8 ranks: 3 or 4 each), the ranks
with fewer compute less: the same as padding with heads of zeros, without sending or computing them. Only a
rank that gets no head at all computes one of zeros, so that it takes part in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank, and the groups that they read."""

    heads: range
    groups: range
    heads_of_groups: tuple[int, ...]
    """Of every such group, the heads that are this rank's."""


def head_shares(num_heads: int, num_groups: int, num_ranks: int) -> list[HeadShare]:
    """The share of every rank; ``num_heads`` is a multiple of ``num_groups``."""
    per_group = num_heads // num_groups
    shares = []
    for rank in range(num_ranks):
        heads = range(rank * num_heads // num_ranks, (rank + 1) * num_heads // num_ranks)
        groups = range(heads.start // per_group, -(-heads.stop // per_group)) if heads else range(0)
        counts = tuple(
            min(heads.stop, (group + 1) * per_group) - max(heads.start, group * per_group) for group in groups
        )
        shares.append(HeadShare(heads, groups, counts))
    return shares
