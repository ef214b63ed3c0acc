"""Gated linear attention in the SpikingBrain-7B form, on megatron-core's parallel linears.

Per head, with keys, values and gates shared by the heads of a group (SpikingBrain, arXiv 2509.05276, eq.
10-11; Yang et al., arXiv 2312.06635):

    q, k = relu(q), relu(k)
    log g = logsigmoid(W2 (W1 x) + b2) / gate_logit_normalizer
    S_t = diag(g_t) S_{t-1} + k_t^T v_t,   o_t = K^-0.5 q_t S_t
    y = W_o RMSNorm(o)        (one norm weight of head width, shared by all heads)

No rotary positions: the gate carries the order.

Shape letters: T time, B batch, H query heads and G groups of this tensor-parallel rank, K key and V value
width.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from spikingbrain_train.config.model import GatedLinearAttentionConfig
from spikingbrain_train.config.parallel import LinearAttentionBackend
from spikingbrain_train.models.rms_norm import RMSNorm
from spikingbrain_train.ops.gated_linear_attention import gated_linear_attention
from spikingbrain_train.ops.rms_norm import rms_norm


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


class GatedLinearAttention(SelfAttention):
    """A drop-in for SelfAttention whose core is gated linear attention.

    It keeps SelfAttention's fused ``linear_qkv`` (with bias or q/k norms where the source has them) and
    ``linear_proj``, so a dense layer's weights fit unchanged, and adds ``linear_gate_down_proj``,
    ``linear_gate_up_proj`` and ``out_norm``: the only parameters the source does not have.
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
        **kwargs: object,
    ) -> None:
        super().__init__(
            config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection, **kwargs
        )
        assert config.kv_channels is not None and config.num_query_groups is not None
        self.backend = backend.value
        self.gate_logit_normalizer = gla.gate_logit_normalizer
        self.scale = config.kv_channels**-0.5
        self.linear_gate_down_proj = LowRankDownProjection(
            config, gla.gate_low_rank_dim, init_std=gla.init_gate_std
        )
        self.linear_gate_up_proj = ColumnParallelLinear(
            gla.gate_low_rank_dim,
            config.num_query_groups * config.kv_channels,
            config=config,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=gla.init_gate_std),
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            tp_group=self.pg_collection.tp,
        )
        self.out_norm = RMSNorm(
            config, config.kv_channels, eps=config.layernorm_epsilon, sequence_parallel=False
        )
        if config.perform_initialization:
            with torch.no_grad():
                bias_GK = self.linear_gate_up_proj.bias.view(-1, config.kv_channels)
                bias_GK.copy_(torch.tensor(gla.init_gate_bias(config.kv_channels)))
                self.out_norm.weight.fill_(gla.init_out_norm)
        for parameter in (
            self.linear_gate_down_proj.weight,
            self.linear_gate_up_proj.weight,
            self.linear_gate_up_proj.bias,
            self.out_norm.weight,
        ):
            parameter.is_new_parameter = True  # type: ignore[union-attr]

    def log_gate(self, hidden_states: Tensor) -> Tensor:
        """Logarithm of the per-channel decay.

        Args:
            hidden_states: [T, B, hidden_size], or this rank's share of the sequence under sequence
                parallelism.

        Returns:
            [T, B, G, K] over the whole sequence, float32, in (-inf, 0].
        """
        logits, _ = self.linear_gate_up_proj(self.linear_gate_down_proj(hidden_states))
        log_gate = torch.nn.functional.logsigmoid(logits.float()) / self.gate_logit_normalizer
        return log_gate.unflatten(-1, (self.num_query_groups_per_partition, self.key_hidden_size))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence, from an empty state.

        Args:
            hidden_states: [T, B, hidden_size] normed input (this rank's share under sequence parallelism).
            attention_mask: must be None; the recurrence is causal.

        Returns:
            Output of the same shape and the output projection's bias (None).
        """
        assert attention_mask is None, "linear attention is causal by construction; pass attention_mask=None"
        return self.linear_proj(self.normed_heads(hidden_states))

    def normed_heads(self, hidden_states: Tensor) -> Tensor:
        """What the output projection sees.

        Args:
            hidden_states: as in :meth:`forward`.

        Returns:
            [T, B, H * V] normalised outputs of this rank's heads over the whole sequence.
        """
        q_TBHK, k_TBGK, v_TBGV = self.get_query_key_value_tensors(hidden_states)
        q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK = (
            x.transpose(0, 1)
            for x in (torch.relu(q_TBHK), torch.relu(k_TBGK), v_TBGV, self.log_gate(hidden_states))
        )
        o_BTHV, _ = gated_linear_attention(
            q_BTHK, k_BTGK, v_BTGV, log_gate_BTGK, scale=self.scale, backend=self.backend
        )
        # Each rank normalises its own heads with the one shared weight, so its gradient is a partial sum;
        # megatron-core's copy into the tensor-parallel region adds the parts up in the backward pass.
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight, group=self.pg_collection.tp)
        normed_BTHV = rms_norm(o_BTHV, weight, self.out_norm.eps)
        return normed_BTHV.transpose(0, 1).flatten(2)
