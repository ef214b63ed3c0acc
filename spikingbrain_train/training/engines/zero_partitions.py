"""Which elements of which parameters lie in the flat tensors that DeepSpeed's optimizer updates."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.checkpoint.partitioned_state import Piece


def partitions_of(zero: Any, rank: int) -> list[Piece]:
    """This rank's share of every parameter, as ZeRO 1 and 2 cut their groups.

    A group's parameters lie one behind the other in a flat tensor, which is cut into equal parts, one a rank.

    Args:
        zero: DeepSpeed's optimizer.
        rank: of this process among those that share the groups.
    """
    pieces = []
    for number, parameters in enumerate(zero.round_robin_bit16_groups):
        size = int(zero.partition_size[number])
        low, high = rank * size, (rank + 1) * size
        offsets = zero.round_robin_bit16_offsets[number]
        for parameter, offset in zip(parameters, offsets, strict=True):
            start, stop = max(low, offset), min(high, offset + parameter.numel())
            if start < stop:
                partition = zero.single_partition_of_fp32_groups[number]
                pieces.append(Piece(parameter, start - offset, stop - offset, partition, start - low))
    return pieces
