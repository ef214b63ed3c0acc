"""What mixers share that keep the projections of attention and put a recurrence in its place.

Keys, values and states are those of query groups; what heads read goes through a norm, and behind it through
a gate, if one is asked for, into the output projection.

Shape letters: T time, B batch, H query heads of this tensor-parallel rank, V value width, D = H * V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.initializers import OPEN_GATE
from spikingbrain_train.config.parallel import LinearAttentionBackend, LinearAttentionContextParallel
from spikingbrain_train.models.mixers.decoding import CacheSize, DecodingState
from spikingbrain_train.models.mixers.head_norm import HeadNorm
from spikingbrain_train.parallel.context_parallel.reading_on import from_last_rank, state_before_slice


class RecurrentAttention(SelfAttention):
    """SelfAttention's ``linear_qkv`` and ``linear_proj``, with ``out_norm`` and an output gate between them.

    A dense layer's weights fit unchanged; what is added is marked as new.

    Args:
        num_query_groups: of this mixer; None: the model's.
        init_out_norm: initial weight of the norm.
        output_gate: makes ``linear_output_gate``; None: there is none.
        backend: who computes the recurrence.
        context_parallel: how states reach the next slice of a sequence.
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
        num_query_groups: int | None,
        init_out_norm: float,
        output_gate: type | None,
        backend: LinearAttentionBackend,
        context_parallel: LinearAttentionContextParallel,
        **kwargs: object,
    ) -> None:
        if num_query_groups is not None:
            config = copy(config)
            config.num_query_groups = num_query_groups
        super().__init__(
            config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection, **kwargs
        )
        assert config.kv_channels is not None and config.num_query_groups is not None
        self.backend = backend.value
        self.context_parallel = context_parallel
        self.scale = config.kv_channels**-0.5
        self.out_norm = HeadNorm(config, init_out_norm, self.pg_collection.tp)
        self.linear_output_gate = None
        if output_gate is not None:
            self.linear_output_gate = self.new_projection(
                output_gate, config.hidden_size, self.query_projection_size, torch.nn.init.zeros_, OPEN_GATE
            )

    def new_projection(
        self,
        linear: type,
        inputs: int,
        outputs: int,
        init_method: Callable[[Tensor], Tensor],
        bias: float | Tensor | None = None,
    ) -> torch.nn.Module:
        """A column-parallel projection that a dense source has not.

        Args:
            linear: its class.
            inputs: of the whole matrix.
            outputs: of the whole matrix.
            init_method: fills its weight.
            bias: what its bias begins with on this rank, a number or [outputs of the rank]; None: it has
                none.
        """
        built = linear(
            inputs,
            outputs,
            config=self.config,
            init_method=init_method,
            gather_output=False,
            bias=bias is not None,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        if bias is not None and self.config.perform_initialization:
            with torch.no_grad():
                built.bias.copy_(torch.as_tensor(bias))
        for parameter in built.parameters():
            parameter.is_new_parameter = True
        return built

    def read(
        self,
        op: Callable[..., tuple[Tensor, Tensor | None]],
        step: Callable[..., tuple[Tensor, Tensor]],
        inputs: Sequence[Tensor],
        state: RecurrentState | None = None,
        *,
        end_state: Callable[..., tuple[Tensor, Tensor]] | None = None,
        cp_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over the beginning of a text, or on from what is left of it.

        Args:
            op: over any number of tokens.
            step: over one, which is faster where there is one to read behind others.
            inputs: of both [B, T, heads or groups, ...].
            state: behind the text so far; None: this is its beginning.
            end_state: of all inputs but the queries, what ``state_passing`` sends of a slice.
            cp_group: ranks that have a slice of the tokens each; None: all are here. Needs ``end_state``.

        Returns:
            Outputs [B, T, H, V] and the state behind them [B, G, K, V].
        """
        if cp_group is not None:
            assert state is not None and end_state is not None
            before_BGKV = state_before_slice(state.state_BGKV, *end_state(*inputs[1:]), cp_group)
            o_BTHV, final_BGKV = self._read_all(op, inputs, before_BGKV)
            return o_BTHV, from_last_rank(final_BGKV, cp_group)
        if state is not None and inputs[0].shape[1] == 1:
            o_BHV, state_BGKV = step(*(x.squeeze(1) for x in inputs), state.state_BGKV, scale=self.scale)
            return o_BHV.unsqueeze(1), state_BGKV
        return self._read_all(op, inputs, None if state is None else state.state_BGKV)

    def _read_all(
        self, op: Callable[..., tuple[Tensor, Tensor | None]], inputs: Sequence[Tensor], state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        o_BTHV, final_BGKV = op(
            *inputs, scale=self.scale, initial_state=state, output_final_state=True, backend=self.backend
        )
        assert final_BGKV is not None
        return o_BTHV, final_BGKV

    def normed_and_gated(self, o_BTHV: Tensor, hidden_states: Tensor) -> Tensor:
        """What the output projection sees.

        Args:
            o_BTHV: what the heads read.
            hidden_states: the layer's input [T, B, hidden_size].

        Returns:
            [T, B, D].
        """
        normed_TBD = self.out_norm(o_BTHV)
        if self.linear_output_gate is None:
            return normed_TBD
        gate_TBD, _ = self.linear_output_gate(hidden_states)
        return normed_TBD * torch.nn.functional.silu(gate_TBD)


class RecurrentState(DecodingState):
    """What is left of a text, whatever its length.

    Args:
        state_BGKV: behind the text [B, G, K, V], float32.
        inputs_BSC: the last inputs of a short convolution; None: there is none.
    """

    def __init__(self, state_BGKV: Tensor, inputs_BSC: Tensor | None = None) -> None:
        self.state_BGKV = state_BGKV
        self.inputs_BSC = inputs_BSC

    def size(self) -> CacheSize:
        inputs = 0 if self.inputs_BSC is None else self.inputs_BSC.nbytes
        return CacheSize(recurrent=self.state_BGKV.nbytes + inputs)
