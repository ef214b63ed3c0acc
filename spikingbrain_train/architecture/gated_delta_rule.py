"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464), as in Qwen3-Next's linear layers."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.architecture.backends.gated_delta_rule import GATED_DELTA_RULE, DeltaRuleCall
from spikingbrain_train.architecture.context_traffic import ContextTraffic, state_traffic
from spikingbrain_train.architecture.initializers import OPEN_GATE, Constant, Normal, Values
from spikingbrain_train.architecture.mixers import MIXERS, MixerKind, attention_weights
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
from spikingbrain_train.config.model import DeltaRuleActivation, ModelConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    LinearAttentionContextParallel,
    ParallelConfig,
)
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.run import RunConfig

_CHUNK_TOKENS = 64  # of fla's kernels, and of ops/gated_delta_rule/chunk.py
_SEGMENT_ELEMENTS = 1 << 18  # ops/gated_delta_rule/chunk.py keeps a state per so many of its widest operand


def query_groups(model: ModelConfig) -> int:
    """Key/value groups of the layers."""
    return model.gdn.num_query_groups or model.num_query_groups


def is_by_fla(config: RunConfig) -> bool:
    """Whether flash-linear-attention computes it: everywhere but on CPUs, whatever is installed."""
    cluster, call = config.cluster, _call(config, config.model)
    on_gpu = cluster.accelerator is not AcceleratorKind.cpu
    return GATED_DELTA_RULE.expected(cluster.kernels.gated_delta_rule.value, call, on_gpu=on_gpu) == "fla"


def _call(config: RunConfig, model: ModelConfig) -> DeltaRuleCall:
    return DeltaRuleCall(torch_name(config.precision), model.kv_channels)


class GatedDeltaRuleKind(MixerKind):
    """Keeps attention's projections; new are the gate, beta and the output norm, and what options add."""

    name = "gdn"
    keeps_its_output = False
    words = "gated delta rule layers"
    spec = "spikingbrain_train.models.mixers.gated_delta_rule:spec"
    family = "delta"
    sign = "D"
    section = "gdn"
    backends = GATED_DELTA_RULE
    export_module = "spikingbrain_train.hf.gdn_spikingbrain"
    tensor_names = {
        "q_convolution": "q_conv1d.weight",
        "k_convolution": "k_conv1d.weight",
        "v_convolution": "v_conv1d.weight",
        "decay_weight": "a_proj.weight",
        "decay_rate": "A_log",
        "decay_bias": "dt_bias",
        "beta_weight": "b_proj.weight",
        "output_gate_weight": "g_proj.weight",
        "output_gate_bias": "g_proj.bias",
        "out_norm": "g_norm.weight",
    }

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        check_linear_attention_split(model, parallel)

    def check(self, model: ModelConfig) -> None:
        heads, groups, own = model.num_attention_heads, model.num_query_groups, query_groups(model)
        valid = [number for number in divisors(heads) if number % groups == 0]
        require(
            own in valid,
            f"model.gdn.num_query_groups={own} does not fit {heads} heads in {groups} groups, which are "
            f"copied; valid are {either(valid)}, or null for the model's",
        )

    def values_of_nulls(self, model: ModelConfig) -> dict[str, Any]:
        return {"gdn.num_query_groups": query_groups(model)}

    def describe(self, model: ModelConfig) -> str | None:
        """Its options."""
        groups = query_groups(model)
        options = (
            (f"convolution of {model.gdn.short_convolution} tokens", model.gdn.short_convolution > 0),
            ("silu", model.gdn.activation is DeltaRuleActivation.silu),
            ("output gate", model.gdn.output_gate),
            (f"{groups} query groups", groups != model.num_query_groups),
        )
        return ", ".join(words for words, on in options if on) or None

    def weights(self, model: ModelConfig, group: str = "attention") -> tuple[Weight, ...]:
        """What every attention has, the gate and beta of every group, and the output norm."""
        gdn, width, groups, hidden = model.gdn, model.kv_channels, query_groups(model), model.hidden_size
        heads = model.num_attention_heads
        new: list[Weight] = []
        if gdn.short_convolution:
            taps = gdn.short_convolution
            new.append(
                Weight(
                    "conv1d.weight",
                    ("q_convolution", "k_convolution", "v_convolution"),
                    ((heads * width, taps), (groups * width, taps), (groups * width, taps)),
                    "delta rule convolution",
                    layout="query_groups",
                    init=Values((0.0,) * (taps - 1) + (1.0,), "1 for the token itself, 0 for those before"),
                )
            )
        for letter, words in (("decay", "delta rule gate"), ("beta", "delta rule beta")):
            new.append(
                Weight(
                    f"linear_{letter}.weight",
                    (f"{letter}_weight",),
                    ((groups, hidden),),
                    words,
                    init=Normal(gdn.init_gate_std),
                    reads_input=True,
                    projection=("gate", 0),
                )
            )
        shortest, longest = gdn.init_half_life_min, gdn.init_half_life_max
        new += [
            Weight("A_log", ("decay_rate",), ((groups,),), "delta rule gate", init=Constant(0.0)),
            Weight(
                "dt_bias",
                ("decay_bias",),
                ((groups,),),
                "delta rule gate",
                init=Values(
                    tuple(gdn.init_dt_bias(groups)),
                    f"half-lives from {shortest:g} to {longest:g} tokens over the query groups",
                ),
            ),
        ]
        if gdn.output_gate:
            new += [
                Weight(
                    "linear_output_gate.weight",
                    ("output_gate_weight",),
                    ((heads * width, hidden),),
                    "delta rule output gate",
                    init=Constant(0.0),
                    reads_input=True,
                    projection=("gate", 0),
                ),
                Weight(
                    "linear_output_gate.bias",
                    ("output_gate_bias",),
                    ((heads * width,),),
                    "delta rule output gate",
                    init=Constant(OPEN_GATE),
                ),
            ]
        norm = Weight(
            "out_norm.weight",
            ("out_norm",),
            ((width,),),
            "delta rule output norm",
            Split.none,
            init=Constant(gdn.init_out_norm),
        )
        return (*attention_weights(model, group, num_query_groups=groups), *new, norm)

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Reading the state for outputs (2 H d d), for corrections and writing them (4 G d d).

        The recurrence itself, as the published counts have it: the products inside chunks, which replace it,
        are left out.
        """
        width = model.kv_channels
        per_token = (2.0 * model.num_attention_heads + 4.0 * query_groups(model)) * width * width
        return per_token * (1 + model.num_sink_tokens / seq_length)

    def op_call(
        self, config: RunConfig, model: ModelConfig, layout: SequenceLayout, has_documents: bool
    ) -> DeltaRuleCall:
        return _call(config, model)

    def activation_bytes(self, config: RunConfig) -> float:
        model, gdn = config.model, config.model.gdn
        heads, groups = heads_and_groups(config, query_groups(model))
        width = model.kv_channels * bytes_per_element(config.precision)
        # The fused projection, or what the convolution reads in its place; what each step makes of it.
        steps = (gdn.short_convolution > 0) + (gdn.activation is DeltaRuleActivation.silu)
        kept: float = (1 + steps) * (heads + 2 * groups) * width
        # Lengths of queries and keys; what softplus sees and gives, and beta; the output before and after its
        # norm, and one number a head for that.
        kept += (heads + groups) * FP32 + 3 * groups * FP32 + 2 * heads * width + heads * FP32
        if model.qk_layernorm:
            kept += (heads + groups) * (width + FP32)
        if gdn.output_gate:
            kept += 3 * heads * width  # the gate before and after its silu, and the heads that it multiplies
        if model.attn_sub_norm:
            kept += heads * width  # what it makes of them
        return kept + self._op_bytes(config)

    @staticmethod
    def _op_bytes(config: RunConfig) -> float:
        """Bytes per token that the op and its context parallelism keep beside the fused projection."""
        model, parallel = config.model, config.parallel
        heads, groups = heads_and_groups(config, query_groups(model))
        element, rows = bytes_per_element(config.precision), config.stage.micro_batch_size
        width = model.kv_channels * element
        state = groups * model.kv_channels**2 * FP32 * rows
        method, ranks = parallel.context_parallel.gated_linear_attention, parallel.context_parallel_size
        by_fla, kept = is_by_fla(config), 0.0
        is_whole = ranks > 1 and method is LinearAttentionContextParallel.ulysses
        if is_whole:
            heads, groups = ulysses_heads_and_groups(config, query_groups(model))
        elif ranks > 1:
            # Pairs of a state and a transition of all ranks; values beside the zeros of the transition.
            kept += 2 * (ranks + 1) * state / rank_tokens(config) + 2 * groups * width
        if not by_fla or (ranks > 1 and not is_whole):
            kept += groups * (width + 2 * FP32)  # keys of length 1, gates and betas
        kept += heads * width  # queries of length 1
        if by_fla:
            # Keys, values, sums of gates and betas of every head; the inverse of every chunk's system.
            return kept + heads * (2 * width + 2 * FP32 + _CHUNK_TOKENS * element)
        if is_whole:
            kept += groups * width  # values of whole sequences
        return kept + state * max(heads, groups) * model.kv_channels / _SEGMENT_ELEMENTS

    def context_traffic(self, config: RunConfig) -> ContextTraffic:
        """A slice maps the state before it by a matrix a group; gates of a head are single numbers."""
        width = config.model.kv_channels
        return state_traffic(config, query_groups(config.model), transition=width * width)

    def input_projections(self, model: ModelConfig) -> tuple[str, ...]:
        return ("qkv", "gate", "gate", *(("gate",) if model.gdn.output_gate else ()))


GDN = MIXERS.register(GatedDeltaRuleKind())
