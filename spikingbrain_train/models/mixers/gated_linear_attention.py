"""Gated linear attention in both SpikingBrain forms, on megatron-core's parallel linears.

Per head, with keys, values and gates shared by the heads of a group (SpikingBrain, arXiv 2509.05276, eq.
10-11; Yang et al., arXiv 2312.06635):

    7B:  q, k = relu(q), relu(k)           log g = logsigmoid(W2 (W1 x) + b2) / gate_logit_normalizer
    W8ASpike: as 7B, with one matrix for W2 W1
    76B: q, k = sigmoid(q), sigmoid(k)     g = 1 - k, no parameters of its own
    S_t = diag(g_t) S_{t-1} + k_t^T v_t,   o_t = K^-0.5 q_t S_t
    y = W_o RMSNorm(o)        (one norm weight of head width, shared by all heads)

Without rotary positions the gate carries the order. Options that neither form has
(docs/linear_attention_options.md):

- RMSNorm of q and k in front of the features.
- Rotary positions behind the features, as RoFormer puts them into linear attention (Su et al., arXiv
  2104.09864, eq. 19), so that the score of two tokens depends on their distance.
- More groups than softmax attention has, up to one a head.
- One decay a group that never changes, as in Lightning attention (Qin et al., arXiv 2401.04658).
- A gate in front of the output projection, as in fla's layers: ``y = W_o (RMSNorm(o) * swish(W_g x + b_g))``.

Shape letters: T time, B batch, H query heads and G groups of this tensor-parallel rank, K key and V value
width.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.initializers import LightningDecays
from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import FeatureMap, GatedLinearAttentionConfig, GateKind, ModelConfig
from spikingbrain_train.config.parallel import (
    LinearAttentionBackend,
    LinearAttentionContextParallel,
    RotaryBackend,
)
from spikingbrain_train.models.layer_build import LayerBuild, attention_submodules
from spikingbrain_train.models.mixers.gated_linear_start import SetInClosedForm
from spikingbrain_train.models.mixers.head_norm import SharedHeadNorm
from spikingbrain_train.models.mixers.recurrent_attention import RecurrentAttention, RecurrentState
from spikingbrain_train.models.rotary import RotaryPositions, turned
from spikingbrain_train.ops.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_end_state,
)
from spikingbrain_train.ops.gated_linear_attention.naive import gated_linear_attention_step
from spikingbrain_train.parallel.context_parallel.linear_attention import context_parallel_linear_attention

_FEATURES = {FeatureMap.relu: torch.relu, FeatureMap.sigmoid: torch.sigmoid}


def spec(_kind: MixerKind, build: LayerBuild) -> ModuleSpec:
    """Gated linear attention as ``self_attention`` of a layer."""
    return ModuleSpec(
        module=GatedLinearAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "gla": build.model.gla,
            "backend": build.kernels.gated_linear_attention,
            "rotary": build.kernels.rotary,
            "context_parallel": build.context_parallel.gated_linear_attention,
            "rotary_of": build.model if build.model.gla.rotary else None,
            **_gate_projections(build),
            "whole_gate": build.linears.column(Projection.gate),
            "output_gate": build.linears.column(Projection.gate) if build.model.gla.output_gate else None,
        },
        submodules=attention_submodules(build),
    )


def _gate_projections(build: LayerBuild) -> dict[str, type]:
    """Classes of W1 and W2 of the low-rank gate."""
    linears = build.linears
    return {
        "gate_down_proj": linears.transformed(Projection.gate, LowRankDownProjection),
        "gate_up_proj": linears.transformed(
            Projection.gate, ColumnParallelLinear, weight_split_axis=0, matrix=1
        ),
    }


class LowRankDownProjection(torch.nn.Module):
    """W1 of the gate: hidden -> gate_low_rank_dim without bias, replicated over tensor-parallel ranks.

    Under sequence parallelism each rank projects its own share of the sequence, so only gate_low_rank_dim
    numbers per token are gathered later; the weight's gradients are then partial sums, which the
    ``sequence_parallel`` mark makes megatron-core add up.
    """

    def __init__(self, config: TransformerConfig, output_size: int, init_std: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, config.hidden_size, dtype=config.params_dtype)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            torch.nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., gate_low_rank_dim]."""
        return torch.nn.functional.linear(x, self.weight)


class GatedLinearAttention(SetInClosedForm, RecurrentAttention):
    """A drop-in for SelfAttention whose core is gated linear attention.

    It keeps SelfAttention's fused ``linear_qkv`` (with bias or q/k norms where the source has them) and
    ``linear_proj``, so a dense layer's weights fit unchanged, and adds ``out_norm`` and, with a low-rank
    gate, ``linear_gate_down_proj`` and ``linear_gate_up_proj``: the only parameters the source does not have,
    but for those of options (``linear_gate_proj`` of a full-rank gate; ``linear_output_gate``;
    ``q_layernorm``, ``k_layernorm``).
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
        gla: GatedLinearAttentionConfig,
        backend: LinearAttentionBackend,
        rotary: RotaryBackend = RotaryBackend.auto,
        context_parallel: LinearAttentionContextParallel,
        rotary_of: ModelConfig | None = None,
        gate_down_proj: type = LowRankDownProjection,
        gate_up_proj: type = ColumnParallelLinear,
        whole_gate: type = ColumnParallelLinear,
        output_gate: type | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type,
            cp_comm_type,
            pg_collection,
            num_query_groups=gla.num_query_groups,
            init_out_norm=gla.init_out_norm,
            output_gate=output_gate,
            backend=backend,
            context_parallel=context_parallel,
            **kwargs,
        )
        config = self.config
        self.feature_map = gla.feature_map
        self.features = entry_of(gla.feature_map, _FEATURES, "the features of linear attention")
        self.gate = gla.gate
        self.gate_logit_normalizer = gla.gate_logit_normalizer
        self.rotary_positions, self.rotary_backend = None, rotary
        if rotary_of is not None:
            self.rotary_positions = RotaryPositions(rotary_of, on_cpu=config.use_cpu_initialization)
        self.has_qk_norm = config.qk_layernorm or gla.qk_norm
        if gla.qk_norm and not config.qk_layernorm:
            # megatron-core adds up their gradients over tensor-parallel ranks only if all layers have them.
            self.q_layernorm = SharedHeadNorm(config, 1.0, self.pg_collection.tp)
            self.k_layernorm = SharedHeadNorm(config, 1.0, self.pg_collection.tp)
        self._log_gate = entry_of(self.gate, _LOG_GATES, "the log gates of linear attention")
        if self.gate is GateKind.low_rank:
            self._build_low_rank_gate(gla, gate_down_proj, gate_up_proj)
        if self.gate is GateKind.full_rank:
            self.linear_gate_proj = self._last_matrix_of_gate(gla, whole_gate, config.hidden_size)
        if self.gate is GateKind.fixed:
            # Of all groups, on every tensor-parallel rank: a buffer that never changes needs no split.
            decays = LightningDecays().of_layer(
                self.config.num_query_groups, layer_number - 1, config.num_layers
            )
            self.register_buffer("log_decay", torch.tensor(decays, dtype=config.params_dtype))

    def _build_low_rank_gate(
        self, gla: GatedLinearAttentionConfig, gate_down_proj: type, gate_up_proj: type
    ) -> None:
        rank = gla.gate_low_rank_dim
        self.linear_gate_down_proj = gate_down_proj(self.config, rank, init_std=gla.init_gate_std)
        self.linear_gate_up_proj = self._last_matrix_of_gate(gla, gate_up_proj, rank)
        self.linear_gate_down_proj.weight.is_new_parameter = True

    def _last_matrix_of_gate(
        self, gla: GatedLinearAttentionConfig, linear: type, inputs: int
    ) -> torch.nn.Module:
        """What gives a logit for every channel of every group."""
        biases_K = torch.tensor(gla.init_gate_bias(self.key_hidden_size))
        return self.new_projection(
            linear,
            inputs,
            self.config.num_query_groups * self.key_hidden_size,
            lambda weight: torch.nn.init.normal_(weight, std=gla.init_gate_std),
            biases_K.repeat(self.num_query_groups_per_partition),
        )

    def log_gate(self, hidden_states: Tensor, key_logits_TBGK: Tensor) -> Tensor:
        """Logarithm of the per-channel decay.

        Args:
            hidden_states: [T, B, hidden_size], or this rank's share of the sequence under sequence
                parallelism.
            key_logits_TBGK: keys before their feature map, over the whole slice.

        Returns:
            [T, B, G, K] over the whole slice, float32, in (-inf, 0].
        """
        return self._log_gate(self, hidden_states, key_logits_TBGK)

    def _tied_log_gate(self, _hidden_states: Tensor, key_logits_TBGK: Tensor) -> Tensor:
        # log(1 - sigmoid(x)) = logsigmoid(-x), which keeps its digits where k rounds to 1.
        return torch.nn.functional.logsigmoid(-key_logits_TBGK.float())

    def _fixed_log_gate(self, _hidden_states: Tensor, key_logits_TBGK: Tensor) -> Tensor:
        groups = self.num_query_groups_per_partition
        first = self.pg_collection.tp.rank() * groups
        return self.log_decay[first : first + groups].float().unsqueeze(-1).expand(key_logits_TBGK.shape)

    def _low_rank_log_gate(self, hidden_states: Tensor, _key_logits_TBGK: Tensor) -> Tensor:
        return self._of_logits(self.linear_gate_up_proj(self.linear_gate_down_proj(hidden_states))[0])

    def _full_rank_log_gate(self, hidden_states: Tensor, _key_logits_TBGK: Tensor) -> Tensor:
        return self._of_logits(self.linear_gate_proj(hidden_states)[0])

    def _of_logits(self, logits: Tensor) -> Tensor:
        log_gate = torch.nn.functional.logsigmoid(logits.float()) / self.gate_logit_normalizer
        return log_gate.unflatten(-1, (self.num_query_groups_per_partition, self.key_hidden_size))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence, from an empty state.

        Args:
            hidden_states: [T, B, hidden_size] normed input: this rank's slice of the sequence, sinks first
                (its share of that under sequence parallelism).
            attention_mask: must be None; the recurrence is causal.
            rotary_pos_emb: [T, 1 or B, 1, kv_channels] rotary angles of the slice's tokens, read with rotary
                positions only; None has the layer work them out.
            packed_seq_params: layout of the sequences; None is one document a row on one rank, no sinks.

        Returns:
            Output of the same shape and the output projection's bias (None).
        """
        assert attention_mask is None, "linear attention is causal by construction; pass attention_mask=None"
        return self.linear_proj(self.normed_heads(hidden_states, packed_seq_params, rotary_pos_emb))

    def normed_heads(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout | None = None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        """What the output projection sees.

        Args:
            hidden_states: as in :meth:`forward`.
            layout: as ``packed_seq_params`` there.
            rotary_pos_emb: as there.

        Returns:
            [T, B, H * V] normalised outputs of this rank's heads over the whole slice, behind the output gate
            if there is one.
        """
        q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK = self._op_inputs(hidden_states, layout, rotary_pos_emb)
        o_BTHV = context_parallel_linear_attention(
            q_BTHK,
            k_BTGK,
            v_BTGV,
            log_gate_BTGK,
            layout=layout,
            cp_group=self.pg_collection.cp,
            method=self.context_parallel,
            scale=self.scale,
            backend=self.backend,
        )
        return self.normed_and_gated(o_BTHV, hidden_states)

    def _op_inputs(
        self, hidden_states: Tensor, layout: SequenceLayout | None, rotary_pos_emb: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Queries, keys, values and log gates [B, T, heads or groups, dim] over the whole slice."""
        q_TBHK, k_TBGK, v_TBGV = self.get_query_key_value_tensors(hidden_states)
        log_gate_TBGK = self.log_gate(hidden_states, k_TBGK)
        q_TBHK, k_TBGK = self.features(q_TBHK), self.features(k_TBGK)
        if self.rotary_positions is not None:
            if rotary_pos_emb is None:
                rotary_pos_emb = self.rotary_positions(layout or SequenceLayout(len(q_TBHK)))
            q_TBHK = turned(q_TBHK, rotary_pos_emb, self.config, self.rotary_backend)
            k_TBGK = turned(k_TBGK, rotary_pos_emb, self.config, self.rotary_backend)
        return tuple(x.transpose(0, 1) for x in (q_TBHK, k_TBGK, v_TBGV, log_gate_TBGK))

    def begin_decoding(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, RecurrentState]:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        inputs = self._op_inputs(hidden_states, layout, rotary_pos_emb)
        o_BTHV, state_BGKV = self.read(gated_linear_attention, gated_linear_attention_step, inputs)
        output, _ = self.linear_proj(self.normed_and_gated(o_BTHV, hidden_states))
        return output, RecurrentState(state_BGKV)

    def decode(
        self,
        hidden_states: Tensor,
        state: RecurrentState,
        *,
        rotary_pos_emb: Tensor | None,
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        inputs = self._op_inputs(hidden_states, None, rotary_pos_emb)
        o_BTHV, state.state_BGKV = self.read(
            gated_linear_attention,
            gated_linear_attention_step,
            inputs,
            state,
            end_state=gated_linear_attention_end_state,
            cp_group=cp_group,
        )
        return self.linear_proj(self.normed_and_gated(o_BTHV, hidden_states))[0]


_LOG_GATES = {
    GateKind.low_rank: GatedLinearAttention._low_rank_log_gate,
    GateKind.full_rank: GatedLinearAttention._full_rank_log_gate,
    GateKind.tied: GatedLinearAttention._tied_log_gate,
    GateKind.fixed: GatedLinearAttention._fixed_log_gate,
}
