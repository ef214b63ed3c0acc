"""What a pipeline rank keeps of micro-batches that are on their way. Without torch.

Under 1F1B a rank begins with as many forward passes as there are ranks behind it, then does one forward and
one backward pass in turn. With virtual stages it does so for pairs of micro-batch and stage: micro-batches go
in groups of as many as there are ranks, each group through the first stage, then through the second
(megatron-core's ``forward_backward_pipelining_with_interleaving``; arXiv 2104.04473, figure 4).
"""

from __future__ import annotations

from collections.abc import Sequence

_ENOUGH_GROUPS = 4
"""Groups of micro-batches behind which the schedule repeats itself."""


def most_in_flight(kept: Sequence[float], rank: int, ranks: int, micro_batches: int) -> float:
    """The most that a rank keeps at any moment of a step.

    Args:
        kept: what it keeps of one micro-batch in each of its virtual stages; one where there are none.
        rank: of the pipeline, from 0.
        ranks: of the pipeline.
        micro_batches: of a step; with virtual stages a multiple of ``ranks``.
    """
    if len(kept) == 1:
        return min(ranks - rank, micro_batches) * kept[0]
    virtual = len(kept)
    groups = min(micro_batches // ranks, virtual + _ENOUGH_GROUPS)
    forward = [stage for _ in range(groups) for stage in range(virtual) for _ in range(ranks)]
    backward = [virtual - 1 - stage for stage in forward]
    ahead = (ranks - rank - 1) * 2 + (virtual - 1) * ranks  # megatron-core's warm-up
    now = most = 0.0
    for number, stage in enumerate(forward):
        now += kept[stage]
        most = max(most, now)
        if number >= ahead:
            now -= kept[backward[number - ahead]]
    return most
