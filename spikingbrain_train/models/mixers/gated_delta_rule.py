"""The gated delta rule on megatron-core's parallel linears (Gated DeltaNet, arXiv 2412.06464; Qwen3-Next).

Per head, with keys, values, gates and betas shared by the heads of a group:

    q, k, v = W_q x, W_k x, W_v x          (a short convolution and silu behind them are options)
    q, k    = q / |q|, k / |k|
    log g   = -exp(A_log) softplus(W_a x + dt_bias),   beta = sigmoid(W_b x)     (one number a group)
    S_t = g_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t,   o_t = K^-0.5 q_t S_t
    y = W_o RMSNorm(o)                     (option: W_o (RMSNorm(o) * silu(W_g x + b_g)))

With ``num_query_groups`` at ``num_attention_heads``, ``short_convolution=4``, ``activation=silu`` and
``output_gate`` it is transformers' Qwen3NextGatedDeltaNet, but for b_g, which that has not. Norms of q and k
that the source has (Qwen3) stay in front of the lengths: of them the weights of channels are left.

Shape letters: T time, B batch, H query heads and G groups of this tensor-parallel rank, K key and V value
width, C channels of q, k and v together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import DeltaRuleActivation, GatedDeltaRuleConfig
from spikingbrain_train.config.parallel import LinearAttentionBackend, LinearAttentionContextParallel
from spikingbrain_train.models.layer_build import LayerBuild, attention_submodules
from spikingbrain_train.models.mixers.recurrent_attention import RecurrentAttention, RecurrentState
from spikingbrain_train.models.mixers.short_convolution import ShortConvolution
from spikingbrain_train.models.split_parameters import sharded_first_axes
from spikingbrain_train.ops.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_end_state,
    gated_delta_rule_step,
)
from spikingbrain_train.ops.l2_norm import l2_norm
from spikingbrain_train.parallel.context_parallel.delta_rule import context_parallel_delta_rule


def spec(_kind: MixerKind, build: LayerBuild) -> ModuleSpec:
    """The gated delta rule as ``self_attention`` of a layer."""
    return ModuleSpec(
        module=GatedDeltaRule,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "gdn": build.model.gdn,
            "backend": build.kernels.gated_delta_rule,
            "context_parallel": build.context_parallel.gated_linear_attention,
            "gate": build.linears.column(Projection.gate),
        },
        submodules=attention_submodules(build),
    )


class GatedDeltaRule(RecurrentAttention):
    """A drop-in for SelfAttention whose core is the gated delta rule.

    It keeps SelfAttention's fused ``linear_qkv`` (with bias or q/k norms where the source has them) and
    ``linear_proj``, so a dense layer's weights fit unchanged, and adds ``linear_decay``, ``A_log``,
    ``dt_bias``, ``linear_beta`` and ``out_norm``, and as options ``conv1d`` and ``linear_output_gate``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        gdn: GatedDeltaRuleConfig,
        backend: LinearAttentionBackend,
        context_parallel: LinearAttentionContextParallel,
        gate: type = ColumnParallelLinear,
        **kwargs: object,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type,
            cp_comm_type,
            pg_collection,
            num_query_groups=gdn.num_query_groups,
            init_out_norm=gdn.init_out_norm,
            output_gate=gate if gdn.output_gate else None,
            backend=backend,
            context_parallel=context_parallel,
            **kwargs,
        )
        config = self.config
        self.activation = gdn.activation
        self.conv1d = None
        groups, heads = self.num_query_groups_per_partition, self.num_attention_heads_per_partition
        if gdn.short_convolution:
            channels = (heads + 2 * groups) * config.kv_channels
            self.conv1d = ShortConvolution(config, channels, gdn.short_convolution, self.pg_collection.tp)
        self.linear_decay, self.linear_beta = (
            self.new_projection(
                gate,
                config.hidden_size,
                config.num_query_groups,
                lambda weight: torch.nn.init.normal_(weight, std=gdn.init_gate_std),
            )
            for _ in range(2)
        )
        self._build_decays(gdn)

    def _build_decays(self, gdn: GatedDeltaRuleConfig) -> None:
        config, groups = self.config, self.num_query_groups_per_partition
        self.A_log, self.dt_bias = (
            torch.nn.Parameter(torch.empty(groups, dtype=config.params_dtype)) for _ in range(2)
        )
        for parameter in (self.A_log, self.dt_bias):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
            parameter.is_new_parameter = True  # type: ignore[attr-defined]
            parameter.no_weight_decay = True  # type: ignore[attr-defined]
        if config.perform_initialization:
            assert config.num_query_groups is not None
            first = self.pg_collection.tp.rank() * groups
            with torch.no_grad():
                self.A_log.zero_()
                bias = gdn.init_dt_bias(config.num_query_groups)
                self.dt_bias.copy_(torch.tensor(bias[first : first + groups]))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As megatron-core has it, with the parameters of groups split as the groups are."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        of_groups = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        sharded |= sharded_first_axes(of_groups, prefix, sharded_offsets, self.pg_collection.tp, metadata)
        return sharded

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceLayout | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence, from an empty state.

        Args:
            hidden_states: [T, B, hidden_size] normed input: this rank's slice of the sequence, sinks first
                (its share of that under sequence parallelism).
            attention_mask: must be None; the recurrence is causal.
            packed_seq_params: layout of the sequences; None is one document a row on one rank, no sinks.

        Returns:
            Output of the same shape and the output projection's bias (None).
        """
        assert attention_mask is None, "the delta rule is causal by construction; pass attention_mask=None"
        return self.linear_proj(self.normed_heads(hidden_states, packed_seq_params))

    def normed_heads(self, hidden_states: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """What the output projection sees.

        Args:
            hidden_states: as in :meth:`forward`.
            layout: as ``packed_seq_params`` there.

        Returns:
            [T, B, H * V] normalised outputs of this rank's heads over the whole slice, behind the output gate
            if there is one.
        """
        mixed_BTC = self._projected(hidden_states)
        if self.conv1d is not None:
            mixed_BTC = self.conv1d(mixed_BTC, layout, self.pg_collection.cp)
        o_BTHV = context_parallel_delta_rule(
            *self._op_inputs(mixed_BTC, hidden_states),
            layout=layout,
            cp_group=self.pg_collection.cp,
            method=self.context_parallel,
            scale=self.scale,
            backend=self.backend,
        )
        return self.normed_and_gated(o_BTHV, hidden_states)

    def _projected(self, hidden_states: Tensor) -> Tensor:
        """q, k and v of the whole slice as the fused projection orders them: per group its heads, k, v."""
        mixed_TBC, _ = self.linear_qkv(hidden_states)
        return mixed_TBC.transpose(0, 1)

    def _op_inputs(self, mixed_BTC: Tensor, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values, log gates and betas [B, T, heads or groups, (dim)]."""
        if self.activation is DeltaRuleActivation.silu:
            mixed_BTC = torch.nn.functional.silu(mixed_BTC)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed_BTGRK = mixed_BTC.unflatten(-1, (groups, -1, width))
        heads = mixed_BTGRK.shape[3] - 2
        q_BTGRK, k_BTG1K, v_BTG1V = mixed_BTGRK.split([heads, 1, 1], dim=3)
        if self.q_layernorm is not None:
            q_BTGRK, k_BTG1K = self.q_layernorm(q_BTGRK), self.k_layernorm(k_BTG1K)
        beta_TBG = torch.sigmoid(self.linear_beta(hidden_states)[0].float())
        return (
            l2_norm(q_BTGRK).flatten(2, 3),
            l2_norm(k_BTG1K).squeeze(3),
            v_BTG1V.squeeze(3),
            self.log_gate(hidden_states).transpose(0, 1),
            beta_TBG.transpose(0, 1),
        )

    def log_gate(self, hidden_states: Tensor) -> Tensor:
        """Logarithm of the decay of every group: [T, B, G] over the whole slice, float32, below 0."""
        logits_TBG = self.linear_decay(hidden_states)[0].float() + self.dt_bias.float()
        return -self.A_log.float().exp() * torch.nn.functional.softplus(logits_TBG)

    @torch.no_grad()
    def set_half_lives(self, half_life_H: Tensor) -> None:
        """See :class:`~spikingbrain_train.models.mixers.alignable.TakesHalfLives`.

        The heads of a group share a gate: it gets the geometric mean of its heads' half-lives, through
        dt_bias, where the input adds nothing to it.
        """
        half_life_G = half_life_H.view(self.num_query_groups_per_partition, -1).log().mean(-1).exp()
        step_G = math.log(2) / (half_life_G * self.A_log.to(half_life_G.dtype).exp())
        # softplus(b) = step is solved by b = log(exp(step) - 1), which is step itself beyond 30.
        bias_G = torch.where(step_G > 30, step_G, step_G.clamp_max(30).expm1().log())
        self.dt_bias.copy_(bias_G)

    def begin_decoding(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, RecurrentState]:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        mixed_BTC, inputs = self._projected(hidden_states), None
        if self.conv1d is not None:
            inputs = self.conv1d.last_inputs(mixed_BTC, layout)
            mixed_BTC = self.conv1d(mixed_BTC, layout, None)
        op_inputs = self._op_inputs(mixed_BTC, hidden_states)
        o_BTHV, state_BGKV = self.read(gated_delta_rule, gated_delta_rule_step, op_inputs)
        output, _ = self.linear_proj(self.normed_and_gated(o_BTHV, hidden_states))
        return output, RecurrentState(state_BGKV, inputs)

    def decode(
        self,
        hidden_states: Tensor,
        state: RecurrentState,
        *,
        rotary_pos_emb: Tensor | None,
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        mixed_BTC = self._projected(hidden_states)
        if self.conv1d is not None:
            assert state.inputs_BSC is not None
            mixed_BTC, state.inputs_BSC = self.conv1d.read_on(mixed_BTC, state.inputs_BSC, cp_group)
        op_inputs = self._op_inputs(mixed_BTC, hidden_states)
        o_BTHV, state.state_BGKV = self.read(
            gated_delta_rule,
            gated_delta_rule_step,
            op_inputs,
            state,
            end_state=gated_delta_rule_end_state,
            cp_group=cp_group,
        )
        return self.linear_proj(self.normed_and_gated(o_BTHV, hidden_states))[0]
