"""The mapping table: which source tensors make up which Megatron parameter.

One table, :data:`RULES`, lists the parameters of the decoder once. A rule reads: *this Megatron parameter is
made of these roles by this transform, in models and layers where the condition holds*; a source family
contributes only its spelling of the roles (:mod:`~spikingbrain_train.conversion.hf_names`). A role that the
source lacks makes the parameter a new one.

Most rules are one-to-one and serve both directions, exactly, because transforms move rows and never touch
values. Two kinds only lead inwards, and models that have them are refused on export: both branches of a
parallel hybrid layer start from the source's one attention, and :class:`Copies` make experts of its one
feed-forward.

Adding a mixer or a feed-forward means rules for its parameters and names for its roles; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import FeedForward, Mixer, ModelConfig
from spikingbrain_train.conversion.transforms import QUERY_GROUPS, ROWS, Shape, Transform
from spikingbrain_train.errors import CheckpointError


@dataclass(frozen=True)
class LayerKind:
    """What decides which parameters a layer has."""

    mixer: Mixer
    feed_forward: FeedForward

    def __post_init__(self) -> None:
        # Whoever has no rules would silently have no parameters.
        of_kind(self.mixer, _MIXERS_WITH_RULES, "the parameters of a mixer")
        of_kind(self.feed_forward, _FEED_FORWARDS_WITH_RULES, "the parameters of a feed-forward")


_MIXERS_WITH_RULES = dict.fromkeys((Mixer.full, Mixer.swa, Mixer.gla, Mixer.gla_swa, Mixer.gla_full))
_FEED_FORWARDS_WITH_RULES = dict.fromkeys((FeedForward.dense, FeedForward.moe))


@dataclass(frozen=True)
class Copies:
    """Experts made of one dense feed-forward."""

    routed: bool
    """One copy per routed expert, along a leading axis; else the shared experts, side by side in one wide
    SwiGLU."""
    channel_axis: int
    """Axis of the intermediate channels in the dense tensors: 0 of gate and up projection, 1 of the down
    projection."""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter of the decoder; ``{layer}`` in its name makes it one per layer."""

    megatron_name: str
    roles: tuple[str, ...]
    """What each source tensor is; a family's name table spells it."""
    shapes: Callable[[ModelConfig], tuple[Shape, ...]]
    """Shape of each source tensor, in role order."""
    group: str
    """Heading under which the conversion report counts it."""
    transform: Transform = ROWS
    applies: Callable[[ModelConfig, LayerKind], bool] = lambda model, layer: True
    """Whether the parameter exists in such a layer (per-model rules see the first layer's kind)."""
    copies: Copies | None = None
    """How experts repeat the source tensors; None for parameters that hold them once."""
    pads_vocabulary: bool = False
    """Whether Megatron may hold more rows than the vocabulary; they are stripped on export."""

    @property
    def per_layer(self) -> bool:
        """Whether there is one such parameter in every layer."""
        return "{layer}" in self.megatron_name


def _qkv_shapes(model: ModelConfig, *columns: int) -> tuple[Shape, ...]:
    query, group = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    return (query, *columns), (group, *columns), (group, *columns)


def _hidden(model: ModelConfig) -> tuple[Shape, ...]:
    return ((model.hidden_size,),)


def _head(model: ModelConfig) -> tuple[Shape, ...]:
    return ((model.kv_channels,),)


def _dense(model: ModelConfig, layer: LayerKind) -> bool:
    return layer.feed_forward is FeedForward.dense


def _moe(model: ModelConfig, layer: LayerKind) -> bool:
    return layer.feed_forward is FeedForward.moe


def _shared(model: ModelConfig, layer: LayerKind) -> bool:
    return _moe(model, layer) and model.moe.num_shared_experts > 0


def _parallel(model: ModelConfig, layer: LayerKind) -> bool:
    return layer.mixer.is_parallel_hybrid


_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."


def _attention_rules(prefix: str, group: str, is_here: Callable[[Mixer], bool]) -> tuple[Rule, ...]:
    """Projections of one attention, softmax or linear, under ``prefix`` in layers where ``is_here``."""
    return (
        Rule(
            prefix + "linear_qkv.weight",
            ("q_weight", "k_weight", "v_weight"),
            lambda m: _qkv_shapes(m, m.hidden_size),
            group=f"{group} q/k/v",
            transform=QUERY_GROUPS,
            applies=lambda model, layer: is_here(layer.mixer),
        ),
        Rule(
            prefix + "linear_qkv.bias",
            ("q_bias", "k_bias", "v_bias"),
            _qkv_shapes,
            group=f"{group} q/k/v",
            transform=QUERY_GROUPS,
            applies=lambda model, layer: is_here(layer.mixer) and model.add_qkv_bias,
        ),
        Rule(
            prefix + "q_layernorm.weight",
            ("q_norm",),
            _head,
            group="norms",
            applies=lambda model, layer: is_here(layer.mixer) and model.qk_layernorm,
        ),
        Rule(
            prefix + "k_layernorm.weight",
            ("k_norm",),
            _head,
            group="norms",
            applies=lambda model, layer: is_here(layer.mixer) and model.qk_layernorm,
        ),
        Rule(
            prefix + "linear_proj.weight",
            ("o_weight",),
            lambda m: ((m.hidden_size, m.num_attention_heads * m.kv_channels),),
            group=f"{group} output",
            applies=lambda model, layer: is_here(layer.mixer),
        ),
    )


def _linear_attention_rules(prefix: str, is_here: Callable[[Mixer], bool]) -> tuple[Rule, ...]:
    """What linear attention adds: the low-rank gate (a tied one has no parameters) and the output norm."""

    def gated(model: ModelConfig, layer: LayerKind) -> bool:
        return is_here(layer.mixer) and model.gla.gate.has_parameters

    return (
        Rule(
            prefix + "linear_gate_down_proj.weight",
            ("gate_down_weight",),
            lambda m: ((m.gla.gate_low_rank_dim, m.hidden_size),),
            group="GLA gate W1",
            applies=gated,
        ),
        Rule(
            prefix + "linear_gate_up_proj.weight",
            ("gate_up_weight",),
            lambda m: ((m.num_query_groups * m.kv_channels, m.gla.gate_low_rank_dim),),
            group="GLA gate W2",
            applies=gated,
        ),
        Rule(
            prefix + "linear_gate_up_proj.bias",
            ("gate_up_bias",),
            lambda m: ((m.num_query_groups * m.kv_channels,),),
            group="GLA gate b2",
            applies=gated,
        ),
        Rule(
            prefix + "out_norm.weight",
            ("out_norm",),
            _head,
            group="GLA output norm",
            applies=lambda model, layer: is_here(layer.mixer),
        ),
    )


_SOFTMAX_BRANCH = _ATTENTION + "softmax_attention."
_LINEAR_BRANCH = _ATTENTION + "linear_attention."

RULES: tuple[Rule, ...] = (
    Rule(
        "embedding.word_embeddings.weight",
        ("embedding",),
        lambda m: ((m.vocab_size, m.hidden_size),),
        group="embedding",
        pads_vocabulary=True,
    ),
    Rule(
        "sink_embedding.weight",
        ("sinks",),
        lambda m: ((m.num_sink_tokens, m.hidden_size),),
        group="sink tokens",
        applies=lambda model, layer: model.num_sink_tokens > 0,
    ),
    Rule(_LAYER + "input_layernorm.weight", ("input_norm",), _hidden, group="norms"),
    *_attention_rules(_ATTENTION, "attention", lambda mixer: not mixer.is_parallel_hybrid),
    *_linear_attention_rules(_ATTENTION, lambda mixer: mixer is Mixer.gla),
    *_attention_rules(_SOFTMAX_BRANCH, "softmax branch", lambda mixer: mixer.is_parallel_hybrid),
    *_attention_rules(_LINEAR_BRANCH, "linear branch", lambda mixer: mixer.is_parallel_hybrid),
    *_linear_attention_rules(_LINEAR_BRANCH, lambda mixer: mixer.is_parallel_hybrid),
    Rule(
        _ATTENTION + "softmax_norm.weight",
        ("softmax_norm",),
        _hidden,
        group="branch norms",
        applies=_parallel,
    ),
    Rule(
        _ATTENTION + "linear_norm.weight", ("linear_norm",), _hidden, group="branch norms", applies=_parallel
    ),
    Rule(
        _ATTENTION + "branch_weights",
        ("branch_weights",),
        lambda m: ((2,),),
        group="branch weights (softmax, linear)",
        applies=_parallel,
    ),
    Rule(_LAYER + "pre_mlp_layernorm.weight", ("mlp_norm",), _hidden, group="norms"),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        ("mlp_gate_weight", "mlp_up_weight"),
        lambda m: ((m.ffn_hidden_size, m.hidden_size),) * 2,
        group="feed-forward",
        applies=_dense,
    ),
    Rule(
        _LAYER + "mlp.linear_fc2.weight",
        ("mlp_down_weight",),
        lambda m: ((m.hidden_size, m.ffn_hidden_size),),
        group="feed-forward",
        applies=_dense,
    ),
    Rule(
        _LAYER + "mlp.router.weight",
        ("router",),
        lambda m: ((m.moe.num_experts, m.hidden_size),),
        group="router",
        applies=_moe,
    ),
    Rule(
        _LAYER + "mlp.experts.experts.linear_fc1.weight",
        ("mlp_gate_weight", "mlp_up_weight"),
        lambda m: ((m.expert_ffn_hidden_size, m.hidden_size),) * 2,
        group="routed experts",
        applies=_moe,
        copies=Copies(routed=True, channel_axis=0),
    ),
    Rule(
        _LAYER + "mlp.experts.experts.linear_fc2.weight",
        ("mlp_down_weight",),
        lambda m: ((m.hidden_size, m.expert_ffn_hidden_size),),
        group="routed experts",
        applies=_moe,
        copies=Copies(routed=True, channel_axis=1),
    ),
    Rule(
        _LAYER + "mlp.shared_experts.linear_fc1.weight",
        ("mlp_gate_weight", "mlp_up_weight"),
        lambda m: ((m.expert_ffn_hidden_size, m.hidden_size),) * 2,
        group="shared experts",
        applies=_shared,
        copies=Copies(routed=False, channel_axis=0),
    ),
    Rule(
        _LAYER + "mlp.shared_experts.linear_fc2.weight",
        ("mlp_down_weight",),
        lambda m: ((m.hidden_size, m.expert_ffn_hidden_size),),
        group="shared experts",
        applies=_shared,
        copies=Copies(routed=False, channel_axis=1),
    ),
    Rule("decoder.final_layernorm.weight", ("final_norm",), _hidden, group="norms"),
    Rule(
        "output_layer.weight",
        ("output",),
        lambda m: ((m.vocab_size, m.hidden_size),),
        group="output layer",
        applies=lambda model, layer: not model.share_embeddings_and_output_weights,
        pads_vocabulary=True,
    ),
)
"""Every parameter of the decoder, in the order in which a forward pass meets it. Names are the keys of
megatron-core's distributed checkpoints: those of the routed experts hold all experts of a layer, whatever the
topology."""


@dataclass(frozen=True)
class Parameter:
    """One concrete Megatron parameter of one model: a :class:`Rule` applied to a layer."""

    rule: Rule
    layer: int | None
    model: ModelConfig

    @property
    def name(self) -> str:
        """Its key in a Megatron checkpoint, which is the parameter's name except for routed experts."""
        return self.rule.megatron_name.format(layer=self.layer)

    @property
    def hf_shapes(self) -> list[Shape]:
        """Shapes of the source tensors it is made of."""
        return list(self.rule.shapes(self.model))

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron parameter, without vocabulary padding; [experts, rows, columns] if routed."""
        shapes, copies = self.hf_shapes, self.rule.copies
        stacked = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if copies is None:
            return tuple(stacked)
        if copies.routed:
            return (self.model.moe.num_experts, *stacked)
        stacked[copies.channel_axis] *= self.model.moe.num_shared_experts
        return tuple(stacked)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def hf_names(self, names: Mapping[str, str]) -> list[str]:
        """Names of its source tensors in the spelling of a family.

        Raises:
            CheckpointError: the family has no place for this parameter.
        """
        missing = [role for role in self.rule.roles if role not in names]
        if missing:
            raise CheckpointError(f"{self.name} has no counterpart in the requested Hugging Face format")
        return [names[role].format(layer=self.layer) for role in self.rule.roles]

    def fuse(self, parts: list[Tensor]) -> Tensor:
        """The Megatron parameter from its Hugging Face tensors (in :meth:`hf_names` order)."""
        return self.rule.transform.fuse(parts, self.model)

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The Hugging Face tensors (in :meth:`hf_names` order) from the Megatron parameter."""
        return self.rule.transform.split(parameter, self.hf_shapes, self.model)


def model_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of ``model``, in forward order: embedding, layer by layer, final norm, output layer."""
    kinds = [LayerKind(*kind) for kind in zip(model.layer_mixers(), model.layer_feed_forwards(), strict=True)]
    first_layer_rule = next(index for index, rule in enumerate(RULES) if rule.per_layer)
    last_layer_rule = max(index for index, rule in enumerate(RULES) if rule.per_layer)
    for rule in RULES[:first_layer_rule]:
        if rule.applies(model, kinds[0]):
            yield Parameter(rule, None, model)
    for layer, kind in enumerate(kinds):
        for rule in RULES[first_layer_rule : last_layer_rule + 1]:
            if rule.applies(model, kind):
                yield Parameter(rule, layer, model)
    for rule in RULES[last_layer_rule + 1 :]:
        if rule.applies(model, kinds[0]):
            yield Parameter(rule, None, model)
