"""Gated linear attention over the requests of one step of vLLM. Needs torch only.

vLLM lays the tokens of all requests behind each other, those with one new token first. Each request has a
slot in the layer's cache of states.

Shapes: N tokens of the step, R requests, S slots, H query heads, G groups of heads that share a key, a value
and a gate, K key and V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``gated_linear_attention`` of an export: q [B, T, H, K], k, v and log gate [B, T, G, .], state [B, G, K, V]
to outputs [B, T, H, V] and the state behind them."""


@dataclass(frozen=True)
class Requests:
    """What the tokens of a step belong to."""

    slots_R: Tensor
    """int, the slot of each request."""
    starts_R: Tensor
    """int [R + 1], where the tokens of each request begin, and their number at the end."""
    lengths_R: Tensor
    """int, tokens of each request after this step, those of earlier ones included."""
    num_single: int
    """Requests with one new token; they come first."""
    num_longer: int
    """Those with several."""

    def fresh(self) -> Tensor:
        """bool [R], where a request begins in this step: what its slot holds is another's."""
        return self.lengths_R == self.starts_R[1:] - self.starts_R[:-1]


def mix_requests(
    mix: Mix,
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGV: Tensor,
    log_gate_NGK: Tensor,
    states_SGKV: Tensor,
    of: Requests,
) -> Tensor:
    """Outputs [N, H, V], and the states of the requests' slots, changed in place.

    Requests with one token are one call, as a batch, and wait for no value of the device; each longer one is
    a call.
    """
    outputs = []
    tokens = (q_NHK, k_NGK, v_NGV, log_gate_NGK)
    num_requests = of.num_single + of.num_longer
    slots = of.slots_R[:num_requests].long()
    fresh = of.fresh()[:num_requests, None, None, None]
    before = torch.where(fresh, torch.zeros((), dtype=states_SGKV.dtype), states_SGKV[slots])
    if single := of.num_single:
        q, k, v, log_gate = (x[:single, None] for x in tokens)
        o_B1HV, after = mix(q, k, v, log_gate, before[:single])
        states_SGKV[slots[:single]] = after.to(states_SGKV.dtype)
        outputs.append(o_B1HV[:, 0])
    bounds = of.starts_R[single : num_requests + 1].tolist() if of.num_longer else []
    for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False), start=single):
        q, k, v, log_gate = (x[None, begin:end] for x in tokens)
        o_1THV, after = mix(q, k, v, log_gate, before[number : number + 1])
        states_SGKV[slots[number]] = after[0].to(states_SGKV.dtype)
        outputs.append(o_1THV[0])
    return torch.cat(outputs) if outputs else q_NHK.new_empty(0, q_NHK.shape[1], v_NGV.shape[-1])
