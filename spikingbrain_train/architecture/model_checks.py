"""The network on its own: sizes, mixers, sink tokens, experts."""

from __future__ import annotations

from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig
from spikingbrain_train.config.model import (
    FeatureMap,
    FeedForward,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
)
from spikingbrain_train.config.require import above_zero, at_least, divisors, either, require

_MOST_LAYERS = 1000
"""As many as the deepest published transformer has; beyond, a typing error would keep the planner busy."""


def check_model(model: ModelConfig) -> None:
    """Sizes of the network on their own. Raises ConfigurationError."""
    at_least(
        model,
        "model",
        1,
        *(
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
        ),
        *("vocab_size", "max_position_embeddings", "sliding_window", "make_vocab_size_divisible_by"),
    )
    require(
        model.num_layers <= _MOST_LAYERS,
        f"model.num_layers={model.num_layers} must be at most {_MOST_LAYERS}",
    )
    at_least(model, "model", 0, "init_method_std", "num_sink_tokens")
    above_zero(model, "model", "rotary_base", "norm_epsilon")
    for name, noun, example in (
        ("mixers", "mixer", "[gla,swa]"),
        ("feed_forwards", "feed-forward", "[dense]"),
    ):
        listed = getattr(model, name)
        require(
            len(listed) > 0, f"model.{name} is empty; name at least one {noun}, e.g. model.{name}={example}"
        )
        require(
            len(listed) <= model.num_layers,
            f"model.{name} lists {len(listed)} {noun}s for model.num_layers={model.num_layers}; "
            f"list at most one a layer",
        )
    heads, groups = model.num_attention_heads, model.num_query_groups
    require(
        heads % groups == 0,
        f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}; "
        f"valid are {either(divisors(heads))}",
    )
    if any(mixer.softmax_branch for mixer in model.layer_mixers()):
        require(
            model.kv_channels % 2 == 0,
            f"model.kv_channels={model.kv_channels} is odd, but rotary positions turn pairs of channels; "
            f"use an even number",
        )
    _check_linear_attention(model.gla)
    _check_experts(model.moe)
    _check_rope_scaling(model.rope_scaling)


def _check_linear_attention(gla: GatedLinearAttentionConfig) -> None:
    at_least(gla, "model.gla", 1, "gate_low_rank_dim")
    above_zero(gla, "model.gla", "gate_logit_normalizer")
    at_least(gla, "model.gla", 0, "init_gate_std")
    require(
        gla.gate is not GateKind.tied or gla.feature_map is FeatureMap.sigmoid,
        f"model.gla.gate=tied forgets by g = 1 - k, which must stay between 0 and 1, but keys of "
        f"model.gla.feature_map={gla.feature_map.name} have no upper bound; set "
        f"model.gla.feature_map=sigmoid, or model.gla.gate=low_rank",
    )


def _check_experts(moe: MoEConfig) -> None:
    at_least(moe, "model.moe", 1, "num_experts", "router_topk", "moe_ffn_hidden_size")
    at_least(moe, "model.moe", 0, "num_shared_experts", "aux_loss_coeff", "z_loss_coeff")
    above_zero(moe, "model.moe", "capacity_factor")
    require(
        moe.router_topk <= moe.num_experts,
        f"model.moe.router_topk={moe.router_topk} is more than model.moe.num_experts={moe.num_experts}; "
        f"a token can visit {moe.num_experts} at most",
    )
    require(
        moe.capacity_factor is not None or not moe.pad_to_capacity,
        "model.moe.pad_to_capacity=true needs model.moe.capacity_factor, the length to pad to, e.g. 1.25; "
        "without one set it to false",
    )
    most = moe.num_experts / moe.router_topk
    require(
        not moe.pad_to_capacity or (moe.capacity_factor or 0.0) <= most,
        f"model.moe.capacity_factor={moe.capacity_factor} with model.moe.pad_to_capacity=true gives every "
        f"expert more places than there are tokens; use at most num_experts / router_topk = {most:g}",
    )


def _check_rope_scaling(scaling: RopeScalingConfig) -> None:
    at_least(scaling, "model.rope_scaling", 1, "factor", "original_max_position_embeddings")
    above_zero(scaling, "model.rope_scaling", "low_freq_factor", "high_freq_factor")
    require(
        scaling.factor == 1 or scaling.low_freq_factor < scaling.high_freq_factor,
        f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor} must be greater than "
        f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor}",
    )


def has_experts(model: ModelConfig) -> bool:
    """Whether any layer is a mixture of experts."""
    return FeedForward.moe in model.layer_feed_forwards()


def check_upcycling(upcycling: UpcyclingConfig) -> None:
    """How experts start as copies. Raises ConfigurationError."""
    at_least(upcycling, "upcycling", 0, "router_init_std")
    require(
        0 <= upcycling.reinit_fraction <= 1,
        f"upcycling.reinit_fraction={upcycling.reinit_fraction} must be between 0 (copies) and 1 (all new)",
    )


def check_conversion(conversion: ConversionConfig) -> None:
    """A recipe without its source; :func:`check_model` judges the network that it makes of one.

    Raises:
        ConfigurationError: a setting is out of range.
    """
    check_upcycling(conversion.upcycling)
    require(
        0 <= conversion.seed < 2**32,
        f"seed={conversion.seed} must be at least 0 and below 2**32 = {2**32}",
    )
