"""The mapping table: which Hugging Face tensors make up which Megatron parameter, in both directions.

One table, :data:`RULES`, lists the parameters of the decoder once. A source family contributes only its
spelling of the tensor roles (:data:`LLAMA_NAMES`, :data:`GLA_SWA_NAMES`). A rule reads: *this Megatron
parameter is made of these roles by this transform, in models and layers where the condition holds*. All
transforms move rows and never touch values, so both directions are exact.

Adding a mixer or a feed-forward means rules for its parameters and names for its roles; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spikingbrain_train.config.errors import CheckpointError
from spikingbrain_train.config.model import Mixer, ModelConfig

Shape = tuple[int, ...]


def fuse_rows(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Stack the parts along dim 0: one part stays as it is, gate and up projection become Megatron's
    ``linear_fc1``."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def split_rows(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`fuse_rows`."""
    return list(torch.split(fused, [shape[0] for shape in shapes], dim=0))


def fuse_query_groups(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k and v rows (all q heads, then all k, then all v) to Megatron's layout: per group its q heads, its
    k, its v.

    Weights are [heads * kv_channels, hidden_size], biases [heads * kv_channels]; the result stacks
    ``num_query_groups`` blocks of ``(heads per group + 2) * kv_channels`` rows.
    """
    groups = model.num_query_groups
    blocks = [part.reshape(groups, -1, model.kv_channels, *part.shape[1:]) for part in parts]
    return torch.cat(blocks, dim=1).reshape(-1, *parts[0].shape[1:])


def split_query_groups(fused: Tensor, shapes: list[Shape], model: ModelConfig) -> list[Tensor]:
    """Undo :func:`fuse_query_groups`."""
    heads_per_group = model.num_attention_heads // model.num_query_groups
    blocks = fused.reshape(model.num_query_groups, heads_per_group + 2, model.kv_channels, *fused.shape[1:])
    parts = torch.split(blocks, [heads_per_group, 1, 1], dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Transform:
    """A row permutation between several Hugging Face tensors and one Megatron parameter."""

    fuse: Callable[[list[Tensor], ModelConfig], Tensor]
    """Hugging Face tensors, in the rule's role order, to the Megatron parameter."""
    split: Callable[[Tensor, list[Shape], ModelConfig], list[Tensor]]
    """The Megatron parameter to the Hugging Face tensors, given their shapes."""


ROWS = Transform(fuse_rows, split_rows)
QUERY_GROUPS = Transform(fuse_query_groups, split_query_groups)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter of the decoder; ``{layer}`` in its name makes it one per layer."""

    megatron_name: str
    roles: tuple[str, ...]
    """What each Hugging Face tensor is; a family's name table spells it."""
    shapes: Callable[[ModelConfig], tuple[Shape, ...]]
    """Shape of each Hugging Face tensor, in role order."""
    group: str
    """Heading under which the conversion report counts it."""
    transform: Transform = ROWS
    applies: Callable[[ModelConfig, Mixer], bool] = lambda model, mixer: True
    """Whether the parameter exists in a layer with this mixer (per-model rules see the first layer's)."""
    pads_vocabulary: bool = False
    """Whether Megatron may hold more rows than the vocabulary; they are stripped on export."""

    @property
    def per_layer(self) -> bool:
        """Whether there is one such parameter in every layer."""
        return "{layer}" in self.megatron_name


def _gla(model: ModelConfig, mixer: Mixer) -> bool:
    return mixer is Mixer.gla


def _qkv_shapes(model: ModelConfig, *columns: int) -> tuple[Shape, ...]:
    query, group = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    return (query, *columns), (group, *columns), (group, *columns)


_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."

RULES: tuple[Rule, ...] = (
    Rule(
        "embedding.word_embeddings.weight",
        ("embedding",),
        lambda m: ((m.vocab_size, m.hidden_size),),
        group="embedding",
        pads_vocabulary=True,
    ),
    Rule(
        _LAYER + "input_layernorm.weight",
        ("input_norm",),
        lambda m: ((m.hidden_size,),),
        group="norms",
    ),
    Rule(
        _ATTENTION + "linear_qkv.weight",
        ("q_weight", "k_weight", "v_weight"),
        lambda m: _qkv_shapes(m, m.hidden_size),
        group="attention q/k/v",
        transform=QUERY_GROUPS,
    ),
    Rule(
        _ATTENTION + "linear_qkv.bias",
        ("q_bias", "k_bias", "v_bias"),
        _qkv_shapes,
        group="attention q/k/v",
        transform=QUERY_GROUPS,
        applies=lambda model, mixer: model.add_qkv_bias,
    ),
    Rule(
        _ATTENTION + "q_layernorm.weight",
        ("q_norm",),
        lambda m: ((m.kv_channels,),),
        group="norms",
        applies=lambda model, mixer: model.qk_layernorm,
    ),
    Rule(
        _ATTENTION + "k_layernorm.weight",
        ("k_norm",),
        lambda m: ((m.kv_channels,),),
        group="norms",
        applies=lambda model, mixer: model.qk_layernorm,
    ),
    Rule(
        _ATTENTION + "linear_proj.weight",
        ("o_weight",),
        lambda m: ((m.hidden_size, m.num_attention_heads * m.kv_channels),),
        group="attention output",
    ),
    Rule(
        _ATTENTION + "linear_gate_down_proj.weight",
        ("gate_down_weight",),
        lambda m: ((m.gla.gate_low_rank_dim, m.hidden_size),),
        group="GLA gate W1",
        applies=_gla,
    ),
    Rule(
        _ATTENTION + "linear_gate_up_proj.weight",
        ("gate_up_weight",),
        lambda m: ((m.num_query_groups * m.kv_channels, m.gla.gate_low_rank_dim),),
        group="GLA gate W2",
        applies=_gla,
    ),
    Rule(
        _ATTENTION + "linear_gate_up_proj.bias",
        ("gate_up_bias",),
        lambda m: ((m.num_query_groups * m.kv_channels,),),
        group="GLA gate b2",
        applies=_gla,
    ),
    Rule(
        _ATTENTION + "out_norm.weight",
        ("out_norm",),
        lambda m: ((m.kv_channels,),),
        group="GLA output norm",
        applies=_gla,
    ),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        ("mlp_norm",),
        lambda m: ((m.hidden_size,),),
        group="norms",
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        ("mlp_gate_weight", "mlp_up_weight"),
        lambda m: ((m.ffn_hidden_size, m.hidden_size),) * 2,
        group="feed-forward",
    ),
    Rule(
        _LAYER + "mlp.linear_fc2.weight",
        ("mlp_down_weight",),
        lambda m: ((m.hidden_size, m.ffn_hidden_size),),
        group="feed-forward",
    ),
    Rule(
        "decoder.final_layernorm.weight",
        ("final_norm",),
        lambda m: ((m.hidden_size,),),
        group="norms",
    ),
    Rule(
        "output_layer.weight",
        ("output",),
        lambda m: ((m.vocab_size, m.hidden_size),),
        group="output layer",
        applies=lambda model, mixer: not model.share_embeddings_and_output_weights,
        pads_vocabulary=True,
    ),
)
"""Every parameter of the decoder, in the order in which a forward pass meets it."""

LLAMA_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "q_weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "k_weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "v_weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "o_weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role names of Llama, Qwen2, Qwen2.5 and Qwen3, which spell them alike."""

GLA_SWA_NAMES: Mapping[str, str] = {
    "embedding": "model.embeddings.weight",
    "input_norm": "model.layers.{layer}.attn_norm.weight",
    "q_weight": "model.layers.{layer}.attn.q_proj.weight",
    "k_weight": "model.layers.{layer}.attn.k_proj.weight",
    "v_weight": "model.layers.{layer}.attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.attn.k_norm.weight",
    "o_weight": "model.layers.{layer}.attn.o_proj.weight",
    "gate_down_weight": "model.layers.{layer}.attn.gk_proj.0.weight",
    "gate_up_weight": "model.layers.{layer}.attn.gk_proj.1.weight",
    "gate_up_bias": "model.layers.{layer}.attn.gk_proj.1.bias",
    "out_norm": "model.layers.{layer}.attn.g_norm.weight",
    "mlp_norm": "model.layers.{layer}.mlp_norm.weight",
    "mlp_gate_weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp_up_weight": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp_down_weight": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Role names of the published SpikingBrain-7B checkpoint; q_norm and k_norm exist only in conversions of
Qwen3."""


@dataclass(frozen=True)
class Parameter:
    """One concrete Megatron parameter of one model: a :class:`Rule` applied to a layer."""

    rule: Rule
    layer: int | None
    model: ModelConfig

    @property
    def name(self) -> str:
        """Megatron parameter name, which is also its key in a distributed checkpoint."""
        return self.rule.megatron_name.format(layer=self.layer)

    @property
    def hf_shapes(self) -> list[Shape]:
        """Shapes of the Hugging Face tensors it is made of."""
        return list(self.rule.shapes(self.model))

    @property
    def shape(self) -> Shape:
        """Shape of the Megatron parameter, without vocabulary padding."""
        shapes = self.hf_shapes
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def hf_names(self, names: Mapping[str, str]) -> list[str]:
        """Names of its Hugging Face tensors in the spelling of a family.

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
    mixers = model.layer_mixers()
    first_layer_rule = next(index for index, rule in enumerate(RULES) if rule.per_layer)
    last_layer_rule = max(index for index, rule in enumerate(RULES) if rule.per_layer)
    for rule in RULES[:first_layer_rule]:
        if rule.applies(model, mixers[0]):
            yield Parameter(rule, None, model)
    for layer, mixer in enumerate(mixers):
        for rule in RULES[first_layer_rule : last_layer_rule + 1]:
            if rule.applies(model, mixer):
                yield Parameter(rule, layer, model)
    for rule in RULES[last_layer_rule + 1 :]:
        if rule.applies(model, mixers[0]):
            yield Parameter(rule, None, model)
