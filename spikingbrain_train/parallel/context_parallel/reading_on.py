"""A text read piece by piece, each piece split over context-parallel ranks in equal contiguous slices.

Every rank knows what the text so far has left behind, and knows it again behind the piece, so that any rank
can go on by itself, as all do with the single tokens of what is written. No gradients.

Shape legend: B batch, T tokens of a slice, G groups, K key dim, V value dim, D channels, W width of a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.config.parallel import LinearAttentionContextParallel
from spikingbrain_train.parallel.context_parallel.communication import all_slices
from spikingbrain_train.parallel.context_parallel.state_passing import advance, start_state_passing


def state_before_slice(
    state_BGKV: Tensor, local_BGKV: Tensor, transition: Tensor, group: ProcessGroup
) -> Tensor:
    """The recurrent state that this rank's slice of a piece begins with.

    Args:
        state_BGKV: behind the text so far, the same on every rank.
        local_BGKV: behind this rank's slice from a zero state.
        transition: what the slice makes of a state before it, [B, G, K] or [B, G, K, K].
        group: the context-parallel ranks in the order of their slices.
    """
    is_first = group.rank() == 0
    if is_first:
        local_BGKV = advance(transition, state_BGKV, local_BGKV)
    method = LinearAttentionContextParallel.allgather
    passed_BGKV = start_state_passing(local_BGKV, transition, group, method).wait()
    return state_BGKV if is_first else passed_BGKV


def inputs_before_slice(x_BTD: Tensor, inputs_BSD: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The last W - 1 inputs of a convolution before this rank's slice, and those behind the whole piece.

    Args:
        x_BTD: inputs of this rank's slice.
        inputs_BSD: the last W - 1 behind the text so far, the same on every rank.
        group: the context-parallel ranks in the order of their slices.
    """
    before = inputs_BSD.shape[1]
    if before == 0:
        return inputs_BSD, inputs_BSD
    ends_BSD = all_slices(x_BTD[:, -before:], group)
    known_BSD = torch.cat((inputs_BSD, ends_BSD), dim=1)
    # A slice may be shorter than what a kernel reaches: then the slices before that one are in it, too.
    own = before + group.rank() * (ends_BSD.shape[1] // group.size())
    return known_BSD[:, own - before : own], known_BSD[:, -before:].clone()


def from_last_rank(x: Tensor, group: ProcessGroup) -> Tensor:
    """What the rank has that holds the end of a piece, on all ranks."""
    received = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.broadcast(received, torch.distributed.get_global_rank(group, group.size() - 1), group)
    return received
