"""What every mixer checks before it works on a slice."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout


def checked_group(
    x_BTHD: Tensor, layout: SequenceLayout | None, cp_group: torch.distributed.ProcessGroup | None
) -> torch.distributed.ProcessGroup | None:
    """The ranks to communicate with, None if there is only this one.

    Args:
        x_BTHD: queries, keys or values of this rank's slice.
        layout: sinks, documents and slices; None is one document a row on one rank.
        cp_group: context-parallel ranks in the order of their slices.

    Raises:
        ValueError: tensor, layout and group do not fit each other.
    """
    group = cp_group if cp_group is not None and cp_group.size() > 1 else None
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if layout is None:
        if group is not None:
            raise ValueError(f"context parallelism over {size} ranks needs a layout: who holds what.")
        return None
    if (layout.context_parallel_size, layout.context_parallel_rank) != (size, rank):
        raise ValueError(
            f"the layout is that of rank {layout.context_parallel_rank} of {layout.context_parallel_size}, "
            f"the context-parallel group has rank {rank} of {size}."
        )
    rows, tokens = x_BTHD.shape[:2]
    if tokens != layout.slice_length:
        raise ValueError(f"q has {tokens} tokens, the layout's slices have {layout.slice_length}.")
    if layout.cu_seqlens is not None and len(layout.cu_seqlens) != rows:
        raise ValueError(f"the layout lists the documents of {len(layout.cu_seqlens)} rows, q has {rows}.")
    return group
