"""The torch side of tests/plugins/fixed_decay.py: a SelfAttention whose core is the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.parallel import LinearAttentionBackend, LinearAttentionContextParallel
from spikingbrain_train.models.layer_build import LayerBuild, attention_submodules
from spikingbrain_train.models.mixers.head_norm import HeadNorm
from spikingbrain_train.parallel.context_parallel.linear_attention import context_parallel_linear_attention


def spec(kind: MixerKind, build: LayerBuild) -> ModuleSpec:
    """The mixer as ``self_attention`` of a layer."""
    settings = kind.own_settings(build.model)
    return ModuleSpec(
        module=FixedDecayAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "slopes": settings.slopes(build.model.num_query_groups),
            "init_out_norm": settings.init_out_norm,
            "backend": build.kernels.gated_linear_attention,
            "context_parallel": build.context_parallel.gated_linear_attention,
        },
        submodules=attention_submodules(build),
    )


class FixedDecayAttention(SelfAttention):
    """Keeps SelfAttention's projections and adds ``out_norm``.

    Args:
        slopes: of every query group of the model.
        init_out_norm: initial weight of the norm.
        backend: who computes the recurrence.
        context_parallel: how the state reaches the next slice.
    """

    def __init__(
        self,
        *args: Any,
        slopes: list[float],
        init_out_norm: float,
        backend: LinearAttentionBackend,
        context_parallel: LinearAttentionContextParallel,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        config, groups = self.config, self.num_query_groups_per_partition
        assert config.kv_channels is not None
        first = self.pg_collection.tp.rank() * groups
        slopes_G = torch.tensor(slopes[first : first + groups])
        self.register_buffer("slopes_G", slopes_G, persistent=False)
        self.backend = backend.value
        self.context_parallel = context_parallel
        self.scale = config.kv_channels**-0.5
        self.out_norm = HeadNorm(config, init_out_norm, self.pg_collection.tp)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceLayout | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence: [T, B, hidden_size] in and out (T a share under sequence parallelism)."""
        return self.linear_proj(self.normed_heads(hidden_states, packed_seq_params))

    def normed_heads(self, hidden_states: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """[T, B, H * V] normalised heads of this rank, for which an align stage fits ``linear_proj``."""
        q_BTHK, k_BTGK, v_BTGV = (x.transpose(0, 1) for x in self.get_query_key_value_tensors(hidden_states))
        log_gate_BTGK = -self.slopes_G[:, None].expand(*k_BTGK.shape).contiguous()
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
        return self.out_norm(o_BTHV)
