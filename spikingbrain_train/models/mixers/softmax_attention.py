"""Full and sliding-window softmax attention (SpikingBrain, arXiv 2509.05276, eq. 1-2).

SelfAttention's projections, biases, q/k norms and tensor parallelism are megatron-core's; what lies between
the projections is ours, because a sequence may hold sinks and several documents and may be split over
context-parallel ranks in contiguous slices.
"""

from __future__ import annotations

from copy import copy

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.rotary import softmax_scale
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.softmax_attention import SoftmaxAttentionKind
from spikingbrain_train.architecture.spikes import SPIKES
from spikingbrain_train.config.parallel import (
    RotaryBackend,
    SlidingWindowContextParallel,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.models.layer_build import LayerBuild, attention_submodules
from spikingbrain_train.models.linears.linear_transform import HasTransforms, Shard
from spikingbrain_train.models.linears.spikes import Spikes
from spikingbrain_train.models.mixers.key_values import KeyValues
from spikingbrain_train.models.rotary import turned
from spikingbrain_train.ops.int8_groups import int8_vectors
from spikingbrain_train.ops.softmax_attention import bidirectional_attention, softmax_attention
from spikingbrain_train.parallel.context_parallel.attention_distances import attention_distances
from spikingbrain_train.parallel.context_parallel.communication import all_slices
from spikingbrain_train.parallel.context_parallel.softmax_attention import context_parallel_softmax_attention


def spec(kind: SoftmaxAttentionKind, build: LayerBuild) -> ModuleSpec:
    """Full or sliding-window attention as ``self_attention`` of a layer."""
    return ModuleSpec(
        module=SoftmaxAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "window": kind.window(build.model),
            "scale": softmax_scale(build.model),
            "backend": build.kernels.softmax_attention,
            "rotary": build.kernels.rotary,
            "context_parallel": build.context_parallel.sliding_window_attention,
            "int8_keys_and_values": build.model.quantization.keys_and_values,
            "query_spikes": Spikes(build.model) if build.model.spiking.queries else None,
        },
        submodules=attention_submodules(build),
    )


class SoftmaxAttention(HasTransforms, SelfAttention):
    """Causal attention with rotary positions, over everything before a token or over a window.

    Args:
        window: keys (the current one included) that a query sees; None for all before it.
        scale: what scores are multiplied by.
        backend: kernel choice, see :class:`~spikingbrain_train.config.parallel.SoftmaxAttentionBackend`.
        rotary: who turns queries and keys by their positions.
        context_parallel: how keys of other context-parallel ranks are seen. Full attention always uses
            Ulysses, whatever is given here.
        int8_keys_and_values: attend to what INT8 numbers hold of keys and values, token by token and head by
            head.
        query_spikes: what makes spikes of queries, behind rotary positions, token by token and head by head.
            Every layer has a copy of its own.
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
        window: int | None,
        scale: float,
        backend: SoftmaxAttentionBackend,
        rotary: RotaryBackend = RotaryBackend.auto,
        context_parallel: SlidingWindowContextParallel,
        int8_keys_and_values: bool = False,
        query_spikes: Spikes | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(
            config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection, **kwargs
        )
        self.window = window
        self.scale = scale
        self.backend, self.rotary_backend = backend.value, rotary
        self.context_parallel = context_parallel if window is not None else None
        self.int8_keys_and_values = int8_keys_and_values
        self.transforms = {} if query_spikes is None else {SPIKES.name: copy(query_spikes)}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [T, B, hidden_size] normed input: this rank's slice of the sequence, sinks first
                (its share of that under sequence parallelism).
            attention_mask: must be None; causality, windows, sinks and documents are built in.
            rotary_pos_emb: [T, 1 or B, 1, kv_channels] rotary angles of the slice's tokens; None turns
                nothing.
            packed_seq_params: layout of the sequences; None is one document a row on one rank, no sinks.

        Returns:
            Output of the same shape and the output projection's bias (None).
        """
        assert attention_mask is None, "masks are built in; pass attention_mask=None"
        q_BTHK, k_BTGK, v_BTGK = self._op_inputs(hidden_states, rotary_pos_emb)
        o_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, packed_seq_params, self.pg_collection.cp)
        return self.linear_proj(o_BTHK.transpose(0, 1).flatten(2))

    def _op_inputs(self, hidden_states: Tensor, rotary_pos_emb: Tensor | None) -> tuple[Tensor, ...]:
        """Rotated queries and keys, and values: [B, T, heads or groups, dim] over the whole slice."""
        q_TBHK, k_TBGK, v_TBGK = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            q_TBHK = turned(q_TBHK, rotary_pos_emb, self.config, self.rotary_backend)
            k_TBGK = turned(k_TBGK, rotary_pos_emb, self.config, self.rotary_backend)
        for transform in self.transforms.values():
            q_TBHK = transform.input(q_TBHK, Shard(self.pg_collection.tp, axis=None, is_copy=False))
        if self.int8_keys_and_values:
            k_TBGK, v_TBGK = int8_vectors(k_TBGK), int8_vectors(v_TBGK)
        return tuple(x.transpose(0, 1) for x in (q_TBHK, k_TBGK, v_TBGK))

    def _attend(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        layout: SequenceLayout | None,
        cp_group: ProcessGroup | None,
    ) -> Tensor:
        return context_parallel_softmax_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            window=self.window,
            layout=layout,
            cp_group=cp_group,
            method=self.context_parallel,
            scale=self.scale,
            backend=self.backend,
        )

    def attention_distances(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.alignable.MeasuresDistances`."""
        q_BTHK, k_BTGK, _ = self._op_inputs(hidden_states, rotary_pos_emb)
        return attention_distances(
            q_BTHK,
            k_BTGK,
            window=self.window,
            layout=layout,
            cp_group=self.pg_collection.cp,
            scale=self.scale,
        )

    def begin_decoding(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, KeyValues]:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        q_BTHK, k_BTGK, v_BTGK = self._op_inputs(hidden_states, rotary_pos_emb)
        o_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, layout, None)
        state = KeyValues(k_BTGK, v_BTGK, num_sink_tokens=layout.num_sink_tokens, window=self.window)
        return self.linear_proj(o_BTHK.transpose(0, 1).flatten(2))[0], state

    def decode(
        self,
        hidden_states: Tensor,
        state: KeyValues,
        *,
        rotary_pos_emb: Tensor | None,
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        q_BTHK, k_BTGK, v_BTGK = self._op_inputs(hidden_states, rotary_pos_emb)
        if cp_group is None and q_BTHK.shape[1] == 1:
            # What is held is what the token sees: no mask is left to apply.
            o_BTHK = bidirectional_attention(q_BTHK, *state.append(k_BTGK, v_BTGK), scale=self.scale)
        else:
            behind = 0
            if cp_group is not None:
                # Every rank sees, and keeps, the keys and values of the whole piece.
                behind = (cp_group.size() - 1 - cp_group.rank()) * k_BTGK.shape[1]
                k_BTGK, v_BTGK = all_slices(k_BTGK, cp_group), all_slices(v_BTGK, cp_group)
            k_BSGK, v_BSGK = state.extend(k_BTGK, v_BTGK)
            end = k_BSGK.shape[1] - behind
            o_BTHK = softmax_attention(
                q_BTHK,
                k_BSGK[:, :end],
                v_BSGK[:, :end],
                window=self.window,
                num_sink_tokens=state.num_sink_tokens,
                scale=self.scale,
                backend=self.backend,
            )
        return self.linear_proj(o_BTHK.transpose(0, 1).flatten(2))[0]
