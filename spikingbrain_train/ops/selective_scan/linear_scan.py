"""The first-order linear recurrence ``h_t = a_t h_{t-1} + b_t``, element by element, for decays a in [0, 1].

Nothing is divided by a decay and no logarithm is taken: products of numbers in [0, 1] are all that a decay
goes into, so that the strongest ones are as exact as the weakest.

Shape legend: S time, ... any shape of independent elements.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

# A step over fewer elements takes the time that Python needs to ask for it.
_ELEMENTS_OF_A_STEP = 1 << 14


def linear_scan(decay_S: Tensor, update_S: Tensor, state: Tensor) -> Tensor:
    """All states, the one before the first token included: [S + 1, ...].

    Small states are scanned in chunks side by side, each from zero; what the state before a chunk adds is its
    product with the decays since then.

    Args:
        decay_S: [S, ...], each in [0, 1].
        update_S: [S, ...].
        state: [...] before the first token.
    """
    S = decay_S.shape[0]
    chunks = min(_ELEMENTS_OF_A_STEP // max(state.numel(), 1), isqrt(S))
    states = torch.empty(S + 1, *state.shape, dtype=state.dtype, device=state.device)
    states[0] = state
    if chunks <= 1:
        steps = states.unbind(0)
        for t, (decay, update) in enumerate(zip(decay_S.unbind(0), update_S.unbind(0), strict=True)):
            torch.addcmul(update, decay, steps[t], out=steps[t + 1])
        return states
    length = -(-S // chunks)
    padding = -S % length
    decay, update = decay_S, update_S
    if padding:
        ends = (0, 0) * state.dim() + (0, padding)
        decay, update = F.pad(decay, ends, value=1.0), F.pad(update, ends)
    decay, update = (x.unflatten(0, (-1, length)).transpose(0, 1) for x in (decay, update))
    local_CM, since_CM = torch.empty_like(update), torch.empty_like(decay)  # C tokens of M chunks
    local_CM[0], since_CM[0] = update[0], decay[0]
    for t in range(1, length):
        torch.addcmul(update[t], decay[t], local_CM[t - 1], out=local_CM[t])
        torch.mul(decay[t], since_CM[t - 1], out=since_CM[t])
    before = [state]
    for local, since in zip(local_CM[-1, :-1].unbind(0), since_CM[-1, :-1].unbind(0), strict=True):
        before.append(torch.addcmul(local, since, before[-1]))
    local_CM.addcmul_(since_CM, torch.stack(before))
    states[1:] = local_CM.transpose(0, 1).flatten(0, 1)[:S]
    return states


def linear_scan_gradients(decay_S: Tensor, grad_S: Tensor, grad_state: Tensor) -> Tensor:
    """Gradients of all states, the one before the first token included: [S + 1, ...].

    The same recurrence from the last token to the first: what reaches a state from its own output, and its
    decay times what reaches the next.

    Args:
        decay_S: as in :func:`linear_scan`.
        grad_S: [S, ...] what each state receives from what read it.
        grad_state: [...] what the last state receives from whatever comes after it.
    """
    last = grad_S[-1] + grad_state
    zero = torch.zeros_like(grad_S[:1])  # nothing reads the state before the first token here
    backwards = torch.cat((zero, grad_S[:-1])).flip(0)
    return linear_scan(decay_S.flip(0), backwards, last).flip(0)
