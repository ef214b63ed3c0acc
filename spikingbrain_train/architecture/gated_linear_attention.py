"""Gated linear attention (SpikingBrain, arXiv 2509.05276, eq. 10-11), and options of other conversions."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.architecture.backends.gated_linear_attention import (
    GATED_LINEAR_ATTENTION,
    LinearAttentionCall,
)
from spikingbrain_train.architecture.context_traffic import ContextTraffic, state_traffic
from spikingbrain_train.architecture.initializers import (
    OPEN_GATE,
    Constant,
    LightningDecays,
    Normal,
    Values,
)
from spikingbrain_train.architecture.mixers import MIXERS, MixerKind, attention_weights
from spikingbrain_train.architecture.rotary import check_rotary, rotary_settings
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.sizes import (
    FP32,
    bytes_per_element,
    heads_and_groups,
    rank_tokens,
    torch_name,
    ulysses_heads_and_groups,
)
from spikingbrain_train.architecture.split_checks import check_linear_attention_split
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.model import GateKind, ModelConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    LinearAttentionContextParallel,
    ParallelConfig,
)
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.run import RunConfig

_FLA_CHUNK_TOKENS = 64
_CHUNK_SEGMENT_ELEMENTS = 1 << 20  # ops/gated_linear_attention/chunk.py keeps a state per so many of q


def repeats_groups(config: RunConfig) -> bool:
    """Whether flash-linear-attention computes it: everywhere but on CPUs, whatever is installed.

    Its kernels know no groups and keep keys, values and gates of every head.
    """
    cluster, call = config.cluster, LinearAttentionCall(torch_name(config.precision))
    on_gpu = cluster.accelerator is not AcceleratorKind.cpu
    asked = cluster.kernels.gated_linear_attention.value
    return GATED_LINEAR_ATTENTION.expected(asked, call, on_gpu=on_gpu) == "fla"


def linear_attention_flops(model: ModelConfig, seq_length: int, num_query_groups: int | None = None) -> float:
    """Forward FLOPs of the recurrence per token of text; null groups are the model's.

    Reading the state (q S, 2 H d d) and writing it (k^T v, 2 G d d: one a group).
    """
    heads, groups = model.num_attention_heads, num_query_groups or model.num_query_groups
    width = model.kv_channels
    return 2.0 * (heads + groups) * width * width * (1 + model.num_sink_tokens / seq_length)


def linear_attention_bytes(config: RunConfig, num_query_groups: int | None = None) -> float:
    """Bytes per token that the op and its context parallelism keep for the backward pass.

    Keys, values, gates and states of any mixer of this recurrence; queries where they are copied. Null groups
    are the model's.
    """
    model, parallel = config.model, config.parallel
    heads, groups = heads_and_groups(config, num_query_groups)
    element, rows = bytes_per_element(config.precision), config.stage.micro_batch_size
    width, fp32_width = model.kv_channels * element, model.kv_channels * FP32
    state = groups * model.kv_channels * fp32_width * rows
    states = heads * model.kv_channels / _CHUNK_SEGMENT_ELEMENTS  # per token, of the chunked form
    method, ranks = parallel.context_parallel.gated_linear_attention, parallel.context_parallel_size
    has_copies = rows > 1  # of queries, which the kernel wants token by token in every row
    kept = 0.0
    if ranks > 1 and method is LinearAttentionContextParallel.ulysses:
        heads, groups = ulysses_heads_and_groups(config, num_query_groups)
        has_copies = True
    elif ranks > 1:
        # What makes the state that the slice hands over: keys, values and decays in float32. States of ranks.
        kept += 4 * groups * fp32_width + (ranks + 1) * state / rank_tokens(config)
        if method is LinearAttentionContextParallel.allscan:
            # What reads the state before the slice: queries times their decay, and the decay.
            kept += heads * width + 2 * groups * fp32_width
    if repeats_groups(config):
        # Keys and values of every head; float32 sums of gates; float32 scores inside chunks.
        kept += heads * (2 * width + fp32_width + _FLA_CHUNK_TOKENS * FP32)
        return kept + heads * width if has_copies else kept
    # The fused projection, of which values are a view (what Ulysses received); the log gate; some states.
    kept += (heads + 2 * groups) * width + groups * fp32_width
    return kept + states * state


_OF_GATES_WITH_MATRICES = {
    *("gla.gate_logit_normalizer", "gla.init_gate_std"),
    *("gla.init_gate_bias_min", "gla.init_gate_bias_max"),
}
_RANK = "gla.gate_low_rank_dim"


def has_own_qk_norm(model: ModelConfig) -> bool:
    """Whether linear layers have q/k norms that the dense source does not have."""
    return model.gla.qk_norm and not model.qk_layernorm


def query_groups(model: ModelConfig) -> int:
    """Key/value groups of linear layers."""
    return model.gla.num_query_groups or model.num_query_groups


def _gate_bias(model: ModelConfig) -> Values:
    """Spreads the channels of a head from fast to slow forgetting."""
    spread = model.gla.init_gate_bias(model.kv_channels)
    return Values(tuple(spread), f"from {spread[0]:g} to {spread[-1]:g} over the channels of each head")


def _low_rank_gate(model: ModelConfig) -> tuple[Weight, ...]:
    gla, channels = model.gla, query_groups(model) * model.kv_channels
    return (
        Weight(
            "linear_gate_down_proj.weight",
            ("gate_down_weight",),
            ((gla.gate_low_rank_dim, model.hidden_size),),
            "GLA gate W1",
            Split.none,
            init=Normal(gla.init_gate_std),
            reads_input=True,
            projection=("gate", 0),
        ),
        Weight(
            "linear_gate_up_proj.weight",
            ("gate_up_weight",),
            ((channels, gla.gate_low_rank_dim),),
            "GLA gate W2",
            init=Normal(gla.init_gate_std),
            projection=("gate", 1),
        ),
        Weight(
            "linear_gate_up_proj.bias",
            ("gate_up_bias",),
            ((channels,),),
            "GLA gate b2",
            init=_gate_bias(model),
        ),
    )


def _full_rank_gate(model: ModelConfig) -> tuple[Weight, ...]:
    channels = query_groups(model) * model.kv_channels
    return (
        Weight(
            "linear_gate_proj.weight",
            ("gate_weight",),
            ((channels, model.hidden_size),),
            "GLA gate W",
            init=Normal(model.gla.init_gate_std),
            reads_input=True,
            projection=("gate", 0),
        ),
        Weight("linear_gate_proj.bias", ("gate_bias",), ((channels,),), "GLA gate b", init=_gate_bias(model)),
    )


def _fixed_decays(model: ModelConfig) -> tuple[Weight, ...]:
    decays = Weight(
        "log_decay",
        ("log_decay",),
        ((query_groups(model),),),
        "GLA fixed decays",
        Split.none,
        init=LightningDecays(),
        is_trained=False,
    )
    return (decays,)


def _no_weights(model: ModelConfig) -> tuple[Weight, ...]:
    return ()


_GATES = {
    GateKind.low_rank: _low_rank_gate,
    GateKind.full_rank: _full_rank_gate,
    GateKind.tied: _no_weights,
    GateKind.fixed: _fixed_decays,
}


class GatedLinearAttentionKind(MixerKind):
    """Both forms: ReLU features with a low-rank gate (7B), sigmoid features with a tied one (76B)."""

    name = "gla"
    keeps_its_output = False
    words = "gated linear attention layers"
    spec = "spikingbrain_train.models.mixers.gated_linear_attention:spec"
    family = "linear"
    backends = GATED_LINEAR_ATTENTION
    export_module = "spikingbrain_train.hf.linear_attention_spikingbrain"
    hf_layers = {"gla_swa": "linear_attention", "spikingbrain": "linear_attention"}
    tensor_names = {
        "gate_down_weight": "gk_proj.0.weight",
        "gate_up_weight": "gk_proj.1.weight",
        "gate_up_bias": "gk_proj.1.bias",
        "gate_weight": "gk_proj.weight",
        "gate_bias": "gk_proj.bias",
        "log_decay": "log_decay",
        "output_gate_weight": "g_proj.weight",
        "output_gate_bias": "g_proj.bias",
        "out_norm": "g_norm.weight",
    }

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        check_linear_attention_split(model, parallel)

    def all_settings(self, model: ModelConfig) -> set[str]:
        return {f"gla.{name}" for name in vars(model.gla)}

    def settings(self, model: ModelConfig) -> set[str]:
        without = set() if model.gla.gate is GateKind.low_rank else {_RANK}
        if not model.gla.gate.has_parameters:
            without |= _OF_GATES_WITH_MATRICES
        if model.qk_layernorm:
            without = without | {"gla.qk_norm"}  # the source's norms are there, whatever it says
        with_others = rotary_settings(model) if model.gla.rotary else set()
        return (self.all_settings(model) - without) | with_others

    def check(self, model: ModelConfig) -> None:
        if model.gla.rotary:
            check_rotary(model)
        heads, groups, own = model.num_attention_heads, model.num_query_groups, query_groups(model)
        valid = [number for number in divisors(heads) if number % groups == 0]
        require(
            own in valid,
            f"model.gla.num_query_groups={own} does not fit {heads} heads in {groups} groups, which are "
            f"copied; valid are {either(valid)}, or null for the model's",
        )

    def values_of_nulls(self, model: ModelConfig) -> dict[str, Any]:
        return {"gla.num_query_groups": query_groups(model)}

    def describe(self, model: ModelConfig) -> str | None:
        """Its options, which the published forms do not have."""
        groups = query_groups(model)
        options = (
            ("q/k norms", has_own_qk_norm(model)),
            ("full-rank gate", model.gla.gate is GateKind.full_rank),
            ("fixed decay", model.gla.gate is GateKind.fixed),
            ("rotary positions", model.gla.rotary),
            ("output gate", model.gla.output_gate),
            (f"{groups} query groups", groups != model.num_query_groups),
        )
        return ", ".join(words for words, on in options if on) or None

    def weights(self, model: ModelConfig, group: str = "attention") -> tuple[Weight, ...]:
        """What every attention has, the gate's matrices (a tied one has none) and the output norm."""
        gla, width, groups = model.gla, model.kv_channels, query_groups(model)
        gate = entry_of(gla.gate, _GATES, "the weights of a gate")(model)
        if gla.output_gate:
            size = model.num_attention_heads * width
            gate += (
                Weight(
                    "linear_output_gate.weight",
                    ("output_gate_weight",),
                    ((size, model.hidden_size),),
                    "GLA output gate",
                    init=Constant(0.0),
                    reads_input=True,
                    projection=("gate", 0),
                ),
                Weight(
                    "linear_output_gate.bias",
                    ("output_gate_bias",),
                    ((size,),),
                    "GLA output gate",
                    init=Constant(OPEN_GATE),
                ),
            )
        # A small output norm keeps the new mixer's contribution low until alignment has trained it.
        norm = Weight(
            "out_norm.weight",
            ("out_norm",),
            ((width,),),
            "GLA output norm",
            Split.none,
            init=Constant(gla.init_out_norm),
        )
        norms_of_q_and_k = "GLA q/k norms" if has_own_qk_norm(model) else None
        return (*attention_weights(model, group, norms_of_q_and_k, groups), *gate, norm)

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        return linear_attention_flops(model, seq_length, query_groups(model))

    def op_call(
        self, config: RunConfig, model: ModelConfig, layout: SequenceLayout, has_documents: bool
    ) -> LinearAttentionCall:
        return LinearAttentionCall(torch_name(config.precision))

    def activation_bytes(self, config: RunConfig) -> float:
        model = config.model
        heads, groups = heads_and_groups(config, query_groups(model))
        element = bytes_per_element(config.precision)
        width, fp32_width = model.kv_channels * element, model.kv_channels * FP32
        # Features of queries and keys; the output before and after its norm, and one number a head for that.
        kept: float = (heads + groups + 2 * heads) * width + heads * FP32
        if model.gla.gate is not GateKind.fixed:
            # What the gate's sigmoid sees; on CPUs torch keeps a second tensor for its gradient.
            kept += groups * fp32_width * (2 if config.cluster.accelerator is AcceleratorKind.cpu else 1)
        elif not repeats_groups(config) and config.parallel.context_parallel_size == 1:
            kept -= groups * fp32_width  # the op's log gates are a view of one number a group
        if model.gla.gate is GateKind.low_rank:
            kept += model.gla.gate_low_rank_dim * element
        if model.qk_layernorm or has_own_qk_norm(model):
            kept += heads * width  # queries before their norm
            if repeats_groups(config):
                kept += (
                    heads + 2 * groups
                ) * width  # the fused projection, of which keys before theirs are a view
        if model.gla.output_gate:
            kept += 3 * heads * width  # the gate before and after its swish, and the heads that it multiplies
        if model.attn_sub_norm:
            kept += heads * width  # what it makes of them
        if model.gla.rotary:
            # Features before they are turned, where the op keeps its inputs as they are; cosines and sines.
            kept += (heads if repeats_groups(config) else heads + groups) * width + 4 * width
        return kept + linear_attention_bytes(config, query_groups(model))

    def context_traffic(self, config: RunConfig) -> ContextTraffic:
        return state_traffic(config, query_groups(config.model), transition=config.model.kv_channels)

    def input_projections(self, model: ModelConfig) -> tuple[str, ...]:
        gates = model.gla.gate.has_parameters + model.gla.output_gate
        return ("qkv", *("gate",) * gates)


GLA = MIXERS.register(GatedLinearAttentionKind())
