"""What gated linear attention offers an align stage: settings in closed form, from the dense source.

The protocols are those of alignable.py, the formulas this project's own (docs/recipe.md). Shape letters as in
gated_linear_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import FeatureMap, GateKind
from spikingbrain_train.config.parallel import LinearAttentionBackend, LinearAttentionContextParallel
from spikingbrain_train.models.rotary import RotaryPositions
from spikingbrain_train.parallel.context_parallel.linear_attention import context_parallel_linear_attention

_CHANNEL_ELEMENTS = 1 << 24
"""Outputs of single channels that exist at a time: 64 MiB in float32."""
_HALF_LIFE_SPREAD = 16.0
"""The channels of a head remember from so many times shorter to so many times longer than the head should."""


class SetInClosedForm:
    """The part of :class:`GatedLinearAttention` that sets its decays, keys and channels."""

    gate: GateKind
    feature_map: FeatureMap
    gate_logit_normalizer: float
    has_qk_norm: bool
    rotary_positions: RotaryPositions | None
    scale: float
    context_parallel: LinearAttentionContextParallel
    pg_collection: ProcessGroupCollection
    key_hidden_size: int
    num_query_groups_per_partition: int
    num_attention_heads_per_partition: int
    linear_qkv: Any
    linear_gate_up_proj: Any
    linear_gate_proj: Any
    k_layernorm: Any
    _op_inputs: Callable[[Tensor, SequenceLayout | None, Tensor | None], tuple[Tensor, ...]]

    @torch.no_grad()
    def set_half_lives(self, half_life_H: Tensor) -> None:
        """See :class:`~spikingbrain_train.models.mixers.alignable.TakesHalfLives`.

        The heads of a group share their gates: its channels are spread evenly, on a logarithmic scale, around
        the geometric mean of its heads' half-lives. A tied gate has no parameters and is left as it is.
        """
        if not self.gate.has_parameters:
            return
        K = self.key_hidden_size
        center_G = half_life_H.view(self.num_query_groups_per_partition, -1).log().mean(-1)
        spread_K = math.log(_HALF_LIFE_SPREAD) * torch.linspace(
            -1, 1, K, dtype=torch.float64, device=half_life_H.device
        )
        log_gate_GK = -math.log(2) * torch.exp(-(center_G[:, None] + spread_K))
        # logsigmoid(b) = -x is solved by b = -log(exp(x) - 1), which is -x itself beyond 30.
        logits_GK = -self.gate_logit_normalizer * log_gate_GK
        bias_GK = torch.where(logits_GK > 30, -logits_GK, -torch.expm1(logits_GK.clamp_max(30)).log())
        self._gate_bias().copy_(bias_GK.flatten())

    def _gate_bias(self) -> Tensor:
        """[G * K]: of the logits of a gate with matrices."""
        whole = self.gate is GateKind.full_rank
        return (self.linear_gate_proj if whole else self.linear_gate_up_proj).bias

    @torch.no_grad()
    def channel_outputs(self, hidden_states: Tensor, layout: SequenceLayout, every: int) -> Tensor | None:
        """See :class:`~spikingbrain_train.models.mixers.alignable.ScalesChannels`.

        A channel is a recurrence of key width 1. ReLU lets a positive factor of a query's row through; q/k
        norms would divide it out, and rotary positions mix the channels of a pair.
        """
        if self.feature_map is not FeatureMap.relu or self.has_qk_norm or self.rotary_positions is not None:
            return None
        q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK = self._op_inputs(hidden_states, layout, None)
        B, T, H, K = q_BTHK.shape
        G, V = v_BTGV.shape[2:]
        taken = layout.every(every)
        o_NHKV = q_BTHK.new_empty(B * len(taken), H, K, V, dtype=torch.float32)
        step = max(1, _CHANNEL_ELEMENTS // (B * T * H * V))
        for first in range(0, K, step):
            c = slice(first, min(first + step, K))
            C = c.stop - c.start
            # Groups g and channels c become groups (g, c) of the same heads.
            q = q_BTHK[..., c].unflatten(2, (G, H // G)).transpose(3, 4).reshape(B, T, C * H, 1)
            k, log_gate = (x[..., c].reshape(B, T, G * C, 1) for x in (k_BTGK, log_gate_BTGK))
            o = context_parallel_linear_attention(
                q,
                k,
                v_BTGV.repeat_interleave(C, dim=2),
                log_gate,
                layout=layout,
                cp_group=self.pg_collection.cp,
                method=self.context_parallel,
                scale=self.scale,
                backend=LinearAttentionBackend.chunk.value,  # kernels want wider keys
            )
            o = o.reshape(B, T, G, C, H // G, V)[:, taken].transpose(3, 4)
            o_NHKV[:, :, c] = o.reshape(-1, H, C, V).float()
        return o_NHKV

    @torch.no_grad()
    def scale_channels(self, scale_HC: Tensor) -> None:
        """See :class:`~spikingbrain_train.models.mixers.alignable.ScalesChannels`; factors go to queries."""
        groups, heads = self.num_query_groups_per_partition, self.num_attention_heads_per_partition
        for rows in (self.linear_qkv.weight, self.linear_qkv.bias):
            if rows is not None:
                blocks = rows.view(groups, heads // groups + 2, self.key_hidden_size, -1)
                blocks[:, : heads // groups].mul_(scale_HC.view(groups, heads // groups, -1, 1))

    @torch.no_grad()
    def balance_keys(self) -> None:
        """Scale every key channel by ``(1 - g) / max(1 - g)``, g the decay that the gate's bias alone gives.

        A channel that forgets slowly sums up many keys, one that forgets fast only a few, so slow channels
        drown the others; with the share that one step adds the state is a moving average. ReLU features pass
        a positive factor through, and so does the norm behind the recurrence up to the channels' balance,
        which is what changes. With q/k norms the factor goes into the key norm's weight, else into the key
        rows of ``linear_qkv``. Channels that rotary positions turn together get the mean factor of both.

        Other forms are left as they are: the keys of a tied gate are that share already, channels of a fixed
        decay forget alike, and sigmoid features do not scale with their logits. This project's own
        (docs/recipe.md).
        """
        if not self.gate.has_parameters or self.feature_map is not FeatureMap.relu:
            return
        bias_GK = self._gate_bias().float().view(-1, self.key_hidden_size)
        share_GK = -torch.expm1(torch.nn.functional.logsigmoid(bias_GK) / self.gate_logit_normalizer)
        if self.rotary_positions is not None:
            share_GK = share_GK.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2)
        factor_GK = share_GK / share_GK.amax(dim=-1, keepdim=True)
        if self.has_qk_norm:
            # One weight serves all groups, on all ranks. As converted the bias is the same in all of them;
            # half-lives of their own hardly change the quotient.
            largest_K = factor_GK.amax(0)
            torch.distributed.all_reduce(
                largest_K, torch.distributed.ReduceOp.MAX, group=self.pg_collection.tp
            )
            self.k_layernorm.weight.mul_(largest_K)
            return
        groups, key_size = factor_GK.shape
        heads_per_group = self.num_attention_heads_per_partition // groups
        for rows in (self.linear_qkv.weight, self.linear_qkv.bias):
            if rows is not None:
                blocks = rows.view(groups, heads_per_group + 2, key_size, -1)
                blocks[:, heads_per_group].mul_(factor_GK[..., None])
