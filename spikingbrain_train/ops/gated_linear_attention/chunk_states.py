"""States before and after every chunk of a segment, and their gradients.

It is the only part that runs chunk by chunk.

Shape legend: N chunks, B batch, G groups, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_states(update_NBGKV: Tensor, chunk_decay_NBGK1: Tensor, state_BGKV: Tensor) -> Tensor:
    """``S' = chunk_decay * S + update`` from the first chunk to the last: [N + 1, B, G, K, V]."""
    N = update_NBGKV.shape[0]
    states = state_BGKV.new_empty(N + 1, *state_BGKV.shape)
    states[0] = state_BGKV
    views = states.unbind(0)
    for n, (update, decay) in enumerate(
        zip(update_NBGKV.unbind(0), chunk_decay_NBGK1.unbind(0), strict=True)
    ):
        torch.addcmul(update, views[n], decay, out=views[n + 1])
    return states


def scan_gradients(
    through_output_NBGKV: Tensor, chunk_decay_NBGK1: Tensor, grad_state_BGKV: Tensor
) -> Tensor:
    """Gradients of all states [N + 1, B, G, K, V], from the last to the first.

    Args:
        through_output_NBGKV: what the state before each chunk receives from the outputs of that chunk.
        chunk_decay_NBGK1: as in :func:`scan_states`.
        grad_state_BGKV: gradient of the state after the last chunk.
    """
    N = through_output_NBGKV.shape[0]
    grad_states = grad_state_BGKV.new_empty(N + 1, *grad_state_BGKV.shape)
    grad_states[N] = grad_state_BGKV
    views = grad_states.unbind(0)
    for n in reversed(range(N)):
        torch.addcmul(through_output_NBGKV[n], views[n + 1], chunk_decay_NBGK1[n], out=views[n])
    return grad_states
