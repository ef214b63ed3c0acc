"""What the network is: the sizes of a decoder and the sequence mixer of each of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from omegaconf import MISSING

from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Q8InputsConfig,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.rope_scaling import RopeScalingConfig
from spikingbrain_train.config.setting import (
    FUNCTION,
    START,
    TRAINING,
    WEIGHTS,
    OnChange,
    Resuming,
    Role,
    setting,
)
from spikingbrain_train.config.shown import shown

_MOST_LAYERS = 1000
"""As many as the deepest published transformer has; beyond, a typing error would keep the planner busy."""
_TRAINED = Resuming(OnChange.refused, "its optimizer holds other experts", Role.training)


class FeatureMap(str, Enum):
    """The non-negative function of q and k in gated linear attention."""

    relu = "relu"
    """max(0, x), as in SpikingBrain-7B."""
    sigmoid = "sigmoid"
    """1 / (1 + exp(-x)), as in SpikingBrain-76B."""


class GateKind(str, Enum):
    """Where the forget gate of gated linear attention comes from."""

    low_rank = "low_rank"
    """``log g = logsigmoid(W2 (W1 x) + b2) / gate_logit_normalizer``: SpikingBrain-7B."""
    full_rank = "full_rank"
    """``log g = logsigmoid(W x + b) / gate_logit_normalizer``: the published W8ASpike form, which merged the
    two matrices into one."""
    tied = "tied"
    """``g = 1 - k``, no parameters of its own; k must be a sigmoid: SpikingBrain-76B."""
    fixed = "fixed"
    """One constant decay a query group, stored with the weights and never trained; it begins as Lightning
    attention's."""

    @property
    def has_parameters(self) -> bool:
        """Whether it is computed by matrices of its own."""
        return entry_of(self, _GATES_WITH_PARAMETERS, "the parameters of a gate")


_GATES_WITH_PARAMETERS = {
    GateKind.low_rank: True,
    GateKind.full_rank: True,
    GateKind.tied: False,
    GateKind.fixed: False,
}


class ActivationFunc(str, Enum):
    """The function of the gate in feed-forwards: ``down(act(gate x) * (up x))``."""

    silu = "silu"
    """``x * sigmoid(x)``, which makes them SwiGLUs; never exactly zero."""
    relu = "relu"
    """max(0, x): zeros, whose channels of the up and down projections need not be computed."""
    fatrelu = "fatrelu"
    """x where it is at least model.fatrelu_threshold, else 0 (Kurtz et al., ICML 2020; ProSparse, arXiv
    2402.13516, section 3.2)."""
    relu2 = "relu2"
    """max(0, x) squared (So et al., arXiv 2109.08668; BitNet b1.58 2B4T, arXiv 2504.12285)."""


@dataclass
class GatedLinearAttentionConfig:
    """Both forms of linear attention (eq. 10-11).

    The gate's sizes and starts are those of ``model.gla.gate=low_rank``; all but ``gate_low_rank_dim`` are
    ``full_rank``'s, too.
    """

    feature_map: FeatureMap = setting(FeatureMap.relu, resume=FUNCTION)
    """What makes q and k non-negative; a tied gate needs sigmoid."""
    gate: GateKind = setting(GateKind.low_rank, resume=WEIGHTS)
    """Where the forget gate comes from: matrices of its own, the key, or nowhere."""
    gate_low_rank_dim: int = setting(16, minimum=1, resume=WEIGHTS)
    """Width of the low-rank gate's bottleneck (W1 is [gate_low_rank_dim, hidden_size], without bias)."""
    gate_logit_normalizer: float = setting(16.0, above=0, resume=FUNCTION)
    """Divisor of the logarithm of a gate with matrices; larger means slower forgetting."""
    qk_norm: bool = setting(False, resume=WEIGHTS)
    """RMSNorm of every head of q and k in front of the feature map, for sources without (qk_layernorm=false);
    norms that the source has, as Qwen3, serve linear layers anyway."""
    num_query_groups: int | None = setting(None, minimum=1, resume=WEIGHTS)
    """Key/value groups of linear layers, each with a gate and a state of its own; null is the model's. More,
    up to num_attention_heads, are copies of the source's at conversion."""
    rotary: bool = setting(False, resume=FUNCTION)
    """Rotary positions on the features of q and k, with the model's rotary_base and rope_scaling; they
    restart with every document."""
    output_gate: bool = setting(False, resume=WEIGHTS)
    """A gate in front of the output projection, ``RMSNorm(o) * swish(W x + b)`` as fla has it; it begins at 1
    everywhere (W = 0, swish(b) = 1)."""
    init_gate_bias_min: float = setting(-16.0, resume=START)
    """Initial b2 of a head's first channel, the fastest to forget: its decay of one step starts at
    sigmoid(init_gate_bias_min) ** (1 / gate_logit_normalizer)."""
    init_gate_bias_max: float = setting(4.0, resume=START)
    """Initial b2 of a head's last channel, the slowest; those between are spread evenly, so that every head
    starts with memories from about one token to about a thousand. With rotary positions the two channels that
    turn together share one value.
    """
    init_gate_std: float = setting(0.02, minimum=0, resume=START)
    """Standard deviation of the initial W1 and W2 of a low-rank gate, or W of a full-rank one."""
    init_out_norm: float = setting(0.3, resume=START)
    """Initial weight of the per-head RMSNorm behind the recurrence; a small one keeps a new layer's part in
    the residual stream low until it has learned."""

    def check(self, prefix: str) -> None:
        """The feature map keeps a tied gate between 0 and 1. Raises ConfigurationError."""
        require(
            self.gate is not GateKind.tied or self.feature_map is FeatureMap.sigmoid,
            f"{prefix}gate=tied forgets by g = 1 - k, which must stay between 0 and 1, but keys of "
            f"{prefix}feature_map={self.feature_map.name} have no upper bound; set "
            f"{prefix}feature_map=sigmoid, or {prefix}gate=low_rank",
        )

    def init_gate_bias(self, kv_channels: int) -> list[float]:
        """Initial b2 of the channels of one head (the same in every head).

        Scores depend on distances alone where the channels of a rotary pair, i and i + kv_channels / 2,
        forget at the same rate.
        """
        rates = kv_channels // 2 if self.rotary else kv_channels
        step = (self.init_gate_bias_max - self.init_gate_bias_min) / max(rates - 1, 1)
        return [self.init_gate_bias_min + step * (channel % rates) for channel in range(kv_channels)]


class DeltaRuleActivation(str, Enum):
    """What queries, keys and values of the gated delta rule go through in front of it."""

    none = "none"
    """Nothing: values are those of the source's attention."""
    silu = "silu"
    """``x * sigmoid(x)``, as in Gated DeltaNet and Qwen3-Next."""


@dataclass
class GatedDeltaRuleConfig:
    """Gated DeltaNet (arXiv 2412.06464): ``S_t = g_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t``.

    ``log g = -exp(A_log) softplus(W_a x + dt_bias)``, ``beta = sigmoid(W_b x)``, one number a query group
    each; q and k of length 1. Qwen3-Next has a convolution of 4 tokens, silu, an output gate and a query
    group for every head.
    """

    num_query_groups: int | None = setting(None, minimum=1, resume=WEIGHTS)
    """Key/value groups, each with a gate, a beta and a state of its own; null is the model's. More, up to
    num_attention_heads, are copies of the source's at conversion."""
    short_convolution: int = setting(0, minimum=0, resume=WEIGHTS)
    """Tokens that a causal convolution of every channel of q, k and v reads (4 in Qwen3-Next); 0 has none. It
    begins as if it were not there, and does not look from text to sinks or other documents."""
    activation: DeltaRuleActivation = setting(DeltaRuleActivation.none, resume=FUNCTION)
    """What q, k and v go through, behind the convolution."""
    output_gate: bool = setting(False, resume=WEIGHTS)
    """A gate in front of the output projection, ``RMSNorm(o) * silu(W x + b)``; it begins at 1 everywhere
    (W = 0, silu(b) = 1)."""
    init_half_life_min: float = setting(8.0, above=0, resume=START)
    """Tokens after which the first query group has forgotten half, as the gate begins."""
    init_half_life_max: float = setting(2048.0, above=0, resume=START)
    """The same of the last query group; those between lie on a geometric sequence."""
    init_gate_std: float = setting(0.02, minimum=0, resume=START)
    """Standard deviation of the initial W_a and W_b; beta begins around 1/2."""
    init_out_norm: float = setting(0.3, resume=START)
    """Initial weight of the per-head RMSNorm behind the recurrence; a small one keeps a new layer's part in
    the residual stream low until it has learned."""

    def check(self, prefix: str) -> None:
        """A convolution reads more than a token, and half-lives rise. Raises ConfigurationError."""
        require(
            self.short_convolution != 1,
            f"{prefix}short_convolution=1 would read the token alone; set it to 0 for none, or to 4 as in "
            f"Qwen3-Next",
        )
        require(
            self.init_half_life_min <= self.init_half_life_max,
            f"{prefix}init_half_life_min={self.init_half_life_min:g} is above "
            f"{prefix}init_half_life_max={self.init_half_life_max:g}; swap them",
        )

    def init_dt_bias(self, num_groups: int) -> list[float]:
        """dt_bias of every query group that gives the initial half-lives where A_log = 0."""
        ratio = self.init_half_life_max / self.init_half_life_min
        half_lives = [
            self.init_half_life_min * ratio ** (group / max(num_groups - 1, 1)) for group in range(num_groups)
        ]
        # softplus(b) = log(2) / half_life
        return [math.log(math.expm1(math.log(2) / half_life)) for half_life in half_lives]


@dataclass
class ParallelHybridConfig:
    """Layers with two branches: ``w1 RMSNorm(o_softmax) + w2 RMSNorm(o_linear)`` (eq. 6).

    The report states neither where the norms stand nor whether w1 and w2 learn; here the norms stand behind
    the output projections, and both weights learn.
    """

    init_softmax_weight: float = setting(1.0, resume=START)
    """Initial w1, of the softmax branches (full and sliding-window attention), which share it."""
    init_linear_weight: float = setting(0.0, resume=START)
    """Initial w2, of the linear branches; 0 starts a converted model as close to its source as the softmax
    branch alone is."""
    softmax_dropout: float = setting(0.0, minimum=0, below=1, resume=TRAINING)
    """Share of sequences, drawn layer by layer, that are trained without the softmax branches, beside which
    training ignores linear ones (SpikingBrain2.0: 0.5). Nothing is scaled up: a sequence that keeps them is
    computed as in evaluations."""


class RouterWeights(str, Enum):
    """What the output of a routed expert is weighted by."""

    softmax = "softmax"
    """Its probability among all experts."""
    ones = "ones"
    """1: the chosen experts add up, as the parts of a feed-forward do that was cut into experts (MoEfication,
    arXiv 2110.01786). Gradients reach the router as if it were the probability (straight-through)."""


@dataclass
class MoEConfig:
    """Mixture-of-experts layers: softmax router, top-k routed experts, shared experts that see all tokens."""

    num_experts: int = setting(16, minimum=1, resume=WEIGHTS)
    """Routed experts of a layer, e.g. 16 in SpikingBrain-76B."""
    router_topk: int = setting(1, minimum=1, resume=FUNCTION)
    """Routed experts that each token is sent to."""
    norm_topk_prob: bool = setting(False, resume=FUNCTION)
    """Whether the probabilities of a token's experts are made to add up to 1 (Qwen3-MoE)."""
    router_weights: RouterWeights = setting(RouterWeights.softmax, resume=FUNCTION)
    """What the outputs of a token's experts are weighted by: their probabilities, or ones where experts are
    parts of one feed-forward (docs/bricks.md)."""
    router_hidden_size: int | None = setting(None, minimum=1, resume=WEIGHTS)
    """Width of a hidden layer of tanh in routers, which have two matrices then, as MoEfication's (arXiv
    2110.01786); null has linear routers."""
    router_bias: bool = setting(False, resume=WEIGHTS)
    """Whether logits have a bias of each expert, which no gradient changes: spikingbrain-bricks grow keeps
    new experts out by it (docs/bricks.md)."""
    router_bias_decay_iters: int = setting(0, minimum=0, resume=TRAINING)
    """Steps of a stage over which those biases go to zero, linearly, which lets new experts in; 0 leaves
    them."""
    num_shared_experts: int = setting(1, minimum=0, resume=WEIGHTS)
    """Experts of every token, computed as one feed-forward of num_shared_experts * moe_ffn_hidden_size."""
    moe_ffn_hidden_size: int | None = setting(None, minimum=1, resume=WEIGHTS)
    """Width of one expert; null takes ffn_hidden_size."""
    aux_loss_coeff: float = setting(1.0e-2, minimum=0, resume=TRAINING)
    """Weight of the load-balancing loss, which keeps experts evenly used; chosen here, as the report gives
    none."""
    z_loss_coeff: float = setting(1.0e-3, minimum=0, resume=TRAINING)
    """Weight of the router z-loss, the mean squared log-sum-exp of its logits, which the report does not
    mention."""
    trained: list[int] = setting(default_factory=list, minimum=0, resume=_TRAINED)
    """Experts that train while all else stays as it is, router and other layers too, by their number in every
    layer of experts; empty trains the whole model (docs/bricks.md)."""
    capacity_factor: float | None = setting(None, above=0, resume=TRAINING)
    """Tokens that an expert takes at most, in multiples of tokens * router_topk / num_experts; what is beyond
    is dropped. Null drops nothing."""
    pad_to_capacity: bool = setting(False, resume=TRAINING)
    """Give every expert exactly its capacity, padded with zeros (length alignment); needs capacity_factor."""

    def check(self, prefix: str) -> None:
        """No more experts for a token than there are, nor more capacity than tokens.

        Raises ConfigurationError.
        """
        require(
            self.router_topk <= self.num_experts,
            f"{prefix}router_topk={self.router_topk} is more than {prefix}num_experts={self.num_experts}; "
            f"a token can be routed to {self.num_experts} at most",
        )
        require(
            self.capacity_factor is not None or not self.pad_to_capacity,
            f"{prefix}pad_to_capacity=true needs {prefix}capacity_factor, the length to pad to, e.g. 1.25; "
            f"without one set it to false",
        )
        require(
            self.router_weights is RouterWeights.softmax or not self.norm_topk_prob,
            f"{prefix}norm_topk_prob=true makes probabilities add up to 1, but {prefix}router_weights="
            f"{self.router_weights.value} weighs by none; set one of them back",
        )
        twice = sorted({each for each in self.trained if self.trained.count(each) > 1})
        require(not twice, f"{prefix}trained lists {', '.join(map(str, twice))} more than once")
        unknown = [each for each in self.trained if each >= self.num_experts]
        require(
            not unknown,
            f"{prefix}trained lists {', '.join(map(str, unknown))}, but the experts are 0 to "
            f"{self.num_experts - 1}; list some of those",
        )
        most = self.num_experts / self.router_topk
        require(
            not self.pad_to_capacity or (self.capacity_factor or 0.0) <= most,
            f"{prefix}capacity_factor={self.capacity_factor} with {prefix}pad_to_capacity=true gives every "
            f"expert a capacity above the number of tokens; use at most num_experts / router_topk = {most:g}",
        )


@dataclass
class DecoderConfig:
    """What a model has in common with the dense source it is made of."""

    num_layers: int = setting(MISSING, minimum=1, maximum=_MOST_LAYERS, resume=WEIGHTS)
    """Decoder layers: a mixer and a feed-forward each."""
    hidden_size: int = setting(MISSING, minimum=1, resume=WEIGHTS)
    """Width of the residual stream."""
    ffn_hidden_size: int = setting(MISSING, minimum=1, resume=WEIGHTS)
    """Width of the dense feed-forward, and of an expert where moe.moe_ffn_hidden_size is null."""
    activation_func: ActivationFunc = setting(ActivationFunc.silu, resume=FUNCTION)
    """What the gate of dense feed-forwards and of experts goes through; all but silu make most of their
    channels zero (docs/prosparse.md)."""
    fatrelu_threshold: float = setting(0.01, minimum=0, resume=FUNCTION)
    """Smallest gate that fatrelu lets through (ProSparse: 0.01)."""
    num_attention_heads: int = setting(MISSING, minimum=1, resume=WEIGHTS)
    """Query heads of every mixer."""
    num_query_groups: int = setting(MISSING, minimum=1, resume=WEIGHTS)
    """Key/value groups (GQA); each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = setting(MISSING, minimum=1, resume=WEIGHTS)
    """Width of one head, for keys and values alike."""
    vocab_size: int = setting(MISSING, minimum=1, resume=WEIGHTS)
    """Entries of the tokenizer's vocabulary as the source checkpoint stores them (before padding for TP)."""
    max_position_embeddings: int = setting(MISSING, minimum=1, resume=TRAINING)
    """Longest sequence (tokens) that the model is declared for."""
    rotary_base: float = setting(10000.0, above=0, resume=FUNCTION)
    """Base of the rotary position frequencies (1e6 for Qwen2.5)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Scaling of the rotary frequencies for contexts longer than those of pretraining."""
    norm_epsilon: float = setting(1e-6, above=0, resume=FUNCTION)
    """Epsilon of every RMSNorm, added to the mean square (1e-6 for Qwen, 1e-5 for Llama)."""
    add_qkv_bias: bool = setting(False, resume=WEIGHTS)
    """Whether the q, k and v projections have a bias (Qwen2 and Qwen2.5)."""
    add_output_bias: bool = setting(False, resume=WEIGHTS)
    """Whether the output projection of every mixer has a bias (Llama and Qwen3 with attention_bias)."""
    add_mlp_bias: bool = setting(False, resume=WEIGHTS)
    """Whether the projections of dense feed-forwards have biases (Llama with mlp_bias)."""
    qk_layernorm: bool = setting(False, resume=WEIGHTS)
    """Whether q and k are RMS-normalised per head (Qwen3)."""
    attn_sub_norm: bool = setting(False, resume=WEIGHTS)
    """Whether an RMSNorm over all heads stands in front of the output projection of attention, linear or not
    (BitNet b1.58 2B4T)."""
    ffn_sub_norm: bool = setting(False, resume=WEIGHTS)
    """Whether an RMSNorm over the intermediate width stands in front of the down projection of dense
    feed-forwards (BitNet b1.58 2B4T)."""
    share_embeddings_and_output_weights: bool = setting(False, resume=WEIGHTS)
    """Whether the output projection is the embedding matrix ("tied")."""
    init_method_std: float = setting(0.02, minimum=0, resume=START)
    """Standard deviation of the weights of a model that starts from nothing."""
    make_vocab_size_divisible_by: int = setting(128, minimum=1, resume=TRAINING)
    """The embedding is padded to a multiple of this times tensor_model_parallel_size."""

    def check(self, prefix: str) -> None:
        """Query groups divide the heads. Raises ConfigurationError."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        require(
            heads % groups == 0,
            f"{prefix}num_query_groups={groups} does not divide {prefix}num_attention_heads={heads}; "
            f"valid are {either(divisors(heads))}",
        )


@dataclass
class LayersConfig:
    """What a layer is made of. A conversion gives it to a dense source, a model has it."""

    mixers: list[Any] = setting(default_factory=lambda: ["gla", "swa"], resume=WEIGHTS)
    """Mixer of each layer, repeated until all are filled: gla (gated linear attention), gdn (gated delta
    rule), mamba (selective scan), swa (sliding windows), full (full attention), or a plugin's. [gla,swa] is
    SpikingBrain-7B, [full] is dense. A list in its place is a layer of branches that read the same input
    (eq. 6):
    [[gla,swa],[gla,full]]. With ... at the end the last one goes on instead: [full,gla,...]."""
    sliding_window: int = setting(4096, minimum=1, resume=FUNCTION)
    """Keys (tokens, the current one included) that a sliding-window layer sees."""
    gla: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)
    """Gated linear attention layers."""
    gdn: GatedDeltaRuleConfig = field(default_factory=GatedDeltaRuleConfig)
    """Gated delta rule layers."""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    """Mamba layers."""
    parallel_hybrid: ParallelHybridConfig = field(default_factory=ParallelHybridConfig)
    """Layers of several branches."""
    num_sink_tokens: int = setting(0, minimum=0, resume=WEIGHTS)
    """Learnable embeddings in front of every sequence, seen by all its tokens (section 2.2; 128 in the
    76B)."""
    feed_forwards: list[str] = setting(default_factory=lambda: ["dense"], resume=WEIGHTS)
    """Feed-forward of each layer, repeated until all are filled: dense (gate, up and down), moe (experts),
    no_mlp (none: the layer is its mixer alone), or a plugin's. With ... at the end the last one goes on
    instead: [dense,dense,moe,...]."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Mixture-of-experts layers."""
    spiking: SpikingConfig = field(default_factory=SpikingConfig)
    """Spike encoding in front of projections."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """INT8 weights, keys and values."""
    int8_inputs: Int8InputsConfig = field(default_factory=Int8InputsConfig)
    """INT8 inputs of projections."""
    q8_inputs: Q8InputsConfig = field(default_factory=Q8InputsConfig)
    """INT8 inputs of projections in llama.cpp's blocks."""
    ternary: TernaryConfig = field(default_factory=TernaryConfig)
    """Ternary weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters beside frozen projections."""

    def check(self, prefix: str) -> None:
        """Every layer has a kind, or branches of several. Raises ConfigurationError."""
        for name, noun, example in _LISTS:
            require(
                len(getattr(self, name)) > 0,
                f"{prefix}{name} is empty; name at least one {noun}, e.g. {prefix}{name}={example}",
            )
            require(
                AND_SO_ON not in getattr(self, name)[:-1] and getattr(self, name) != [AND_SO_ON],
                f"{prefix}{name} has {AND_SO_ON} where it says nothing; write it last, behind the {noun} "
                f"of all further layers",
            )
        for index, entry in enumerate(self.mixers):
            if entry == AND_SO_ON:
                continue
            mixer = f"{prefix}mixers[{index}]={shown(entry)}"
            names = entry if isinstance(entry, list) else [entry]
            require(
                (entry is names) == (len(names) > 1) and all(isinstance(name, str) for name in names),
                f"{mixer} does not fit: it takes a mixer's name, or a list of names for branches that read "
                f"the same input, e.g. {prefix}mixers=[gla,[gla,swa]]",
            )
            for name in names:
                require(name not in OLD_MIXERS, f"{mixer} is written {shown(OLD_MIXERS.get(name))} now")
            require(
                len(set(names)) == len(names), f"{mixer} names a mixer twice; branches are of different kinds"
            )


OLD_MIXERS = {"gla_swa": ["gla", "swa"], "gla_full": ["gla", "full"]}
"""Names that earlier releases had for layers of two branches, and what they are."""


AND_SO_ON = "..."
"""Behind the last entry of ``mixers`` or ``feed_forwards``: all further layers have that. Of a list with it a
model of fewer layers takes the first."""

Entry = TypeVar("Entry")


def _each_layers(entries: Sequence[Entry], and_so_on: Entry, num_layers: int) -> list[Entry]:
    """A list of layers written out."""
    if entries[-1] == and_so_on:
        listed = entries[:-1]
        return [listed[min(layer, len(listed) - 1)] for layer in range(num_layers)]
    return [entries[layer % len(entries)] for layer in range(num_layers)]


_LISTS = (("mixers", "mixer", "[gla,swa]"), ("feed_forwards", "feed-forward", "[dense]"))


@dataclass
class ModelConfig(LayersConfig, DecoderConfig):
    """Architecture of the decoder. Field names are Megatron-core's where it has one."""

    def check(self, prefix: str) -> None:
        """There is a layer for each kind that is listed. Raises ConfigurationError."""
        LayersConfig.check(self, prefix)
        for name, noun, _ in _LISTS:
            listed = len(getattr(self, name))
            require(
                listed <= self.num_layers or AND_SO_ON in getattr(self, name),
                f"{prefix}{name} lists {listed} {noun}s for {prefix}num_layers={self.num_layers}; "
                f"list at most one a layer",
            )
        DecoderConfig.check(self, prefix)
        require(
            not self.moe.trained or "moe" in self.feed_forwards,
            f"{prefix}moe.trained lists experts that train alone, but {prefix}feed_forwards has no layers of "
            f"experts (moe); set it to []",
        )

    def layer_mixers(self) -> list[tuple[str, ...]]:
        """Names of the mixers of every layer, in order: one, or those of its branches."""
        entries = [tuple(entry) if isinstance(entry, list) else (entry,) for entry in self.mixers]
        return _each_layers(entries, (AND_SO_ON,), self.num_layers)

    def layer_feed_forwards(self) -> list[str]:
        """Name of the feed-forward of every layer, in order."""
        return _each_layers(self.feed_forwards, AND_SO_ON, self.num_layers)

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding matrix, over all tensor-parallel ranks."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple
