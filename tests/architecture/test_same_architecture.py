"""Two models share weights when, and only when, their parameters are the same."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import pytest

from spikingbrain_train.architecture.same_architecture import (
    check_same_sizes,
    check_same_weights,
    roles,
    settings_in_use,
)
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import (
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
)
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.config.setting import Role, leaves
from spikingbrain_train.errors import CheckpointError
from tests.config.small_model import small_model

MODEL = small_model()
GLA = MODEL.gla
EXPERTS = replace(MODEL, feed_forwards=["dense", "moe"], moe=MoEConfig(num_experts=4))
TIED = GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied)


def test_every_setting_of_a_model_has_a_role() -> None:
    assert list(roles()) == list(leaves(MODEL))


OTHER_WEIGHTS: dict[str, tuple[ModelConfig, ModelConfig, list[str]]] = {
    "depth": (MODEL, replace(MODEL, num_layers=2), ["num_layers=4", "model.num_layers=2"]),
    "width": (MODEL, replace(MODEL, hidden_size=32), ["hidden_size=64", "model.hidden_size=32"]),
    "biases": (MODEL, replace(MODEL, add_qkv_bias=True), ["add_qkv_bias=false", "model.add_qkv_bias=true"]),
    "window to parallel hybrid": (
        replace(MODEL, mixers=["swa"]),
        replace(MODEL, mixers=[["gla", "swa"]]),
        ["mixer swa in layer 0", "model.mixers says [gla,swa]"],
    ),
    "linear to parallel hybrid": (
        MODEL,
        replace(MODEL, mixers=[["gla", "full"], "swa"]),
        ["mixer gla in layer 0", "model.mixers says [gla,full]"],
    ),
    "window to linear": (
        replace(MODEL, mixers=["swa", "gla"]),
        MODEL,
        ["mixer swa in layer 0", "model.mixers says gla"],
    ),
    "sinks": (MODEL, replace(MODEL, num_sink_tokens=6), ["num_sink_tokens=0", "model.num_sink_tokens=6"]),
    "dense to experts": (MODEL, EXPERTS, ["feed-forward dense in layer 1", "model.feed_forwards says moe"]),
    "experts to dense": (EXPERTS, MODEL, ["feed-forward moe in layer 1", "model.feed_forwards says dense"]),
    "number of experts": (
        EXPERTS,
        replace(EXPERTS, moe=MoEConfig(num_experts=8)),
        ["moe.num_experts=4", "model.moe.num_experts=8"],
    ),
    "shared experts": (
        EXPERTS,
        replace(EXPERTS, moe=MoEConfig(num_experts=4, num_shared_experts=2)),
        ["moe.num_shared_experts=1", "model.moe.num_shared_experts=2"],
    ),
    "width of experts": (
        EXPERTS,
        replace(EXPERTS, moe=MoEConfig(num_experts=4, moe_ffn_hidden_size=32)),
        ["moe.moe_ffn_hidden_size=128", "model.moe.moe_ffn_hidden_size=32"],
    ),
    "q/k norms of linear layers": (
        MODEL,
        replace(MODEL, gla=replace(GLA, qk_norm=True)),
        ["gla.qk_norm=false", "model.gla.qk_norm=true"],
    ),
    "groups of linear layers": (
        MODEL,
        replace(MODEL, gla=replace(GLA, num_query_groups=4)),
        ["gla.num_query_groups=2", "model.gla.num_query_groups=4"],
    ),
    "output gates": (
        MODEL,
        replace(MODEL, gla=replace(GLA, output_gate=True)),
        ["gla.output_gate=false", "model.gla.output_gate=true"],
    ),
    "kind of gate": (MODEL, replace(MODEL, gla=TIED), ["gla.gate=low_rank", "model.gla.gate=tied"]),
    "fixed decays": (
        MODEL,
        replace(MODEL, gla=replace(GLA, gate=GateKind.fixed)),
        ["gla.gate=low_rank", "model.gla.gate=fixed"],
    ),
    "rank of gates": (
        MODEL,
        replace(MODEL, gla=replace(GLA, gate_low_rank_dim=8)),
        ["gla.gate_low_rank_dim=16", "model.gla.gate_low_rank_dim=8"],
    ),
    "rank of gates in a parallel hybrid": (
        replace(MODEL, mixers=[["gla", "swa"]]),
        replace(MODEL, mixers=[["gla", "swa"]], gla=replace(GLA, gate_low_rank_dim=8)),
        ["gla.gate_low_rank_dim=16", "model.gla.gate_low_rank_dim=8"],
    ),
}
SAME_WEIGHTS: dict[str, tuple[ModelConfig, ModelConfig]] = {
    "list written out": (MODEL, replace(MODEL, mixers=["gla", "swa"] * 2)),
    "window to full": (MODEL, replace(MODEL, mixers=["gla", "full"])),
    "windows of branches": (
        replace(MODEL, mixers=[["gla", "swa"]]),
        replace(MODEL, mixers=[["gla", "full"]]),
    ),
    "other window, context and positions": (
        MODEL,
        replace(
            MODEL,
            sliding_window=8,
            max_position_embeddings=32768,
            rotary_base=1e6,
            rope_scaling=RopeScalingConfig(RopeType.llama3, factor=8.0),
        ),
    ),
    "spikes": (MODEL, replace(MODEL, spiking=SpikingConfig(projections=[Projection.qkv], k=4.0))),
    "groups of linear layers spelt out": (MODEL, replace(MODEL, gla=replace(GLA, num_query_groups=2))),
    "features and forgetting": (
        MODEL,
        replace(MODEL, gla=replace(GLA, feature_map=FeatureMap.sigmoid, gate_logit_normalizer=4.0)),
    ),
    "routing and its losses": (
        EXPERTS,
        replace(
            EXPERTS,
            moe=MoEConfig(num_experts=4, router_topk=2, aux_loss_coeff=0.0, capacity_factor=1.5),
        ),
    ),
    "width of experts spelt out": (
        EXPERTS,
        replace(EXPERTS, moe=MoEConfig(num_experts=4, moe_ffn_hidden_size=128)),
    ),
    "experts of a model without any": (MODEL, replace(MODEL, moe=MoEConfig(num_experts=8))),
    "gates of a model without any": (
        replace(MODEL, mixers=["full"]),
        replace(MODEL, mixers=["full"], gla=TIED),
    ),
}


@pytest.mark.parametrize("case", OTHER_WEIGHTS)
def test_a_model_with_other_parameters_is_refused_naming_both_values(case: str) -> None:
    stored, model, parts = OTHER_WEIGHTS[case]
    with pytest.raises(CheckpointError) as refusal:
        check_same_weights(stored, model, "checkpoint.load=folder")
    assert str(refusal.value).startswith("checkpoint.load=folder ")
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("case", SAME_WEIGHTS)
def test_a_model_with_the_same_parameters_may_compute_something_else(case: str) -> None:
    check_same_weights(*SAME_WEIGHTS[case], "checkpoint.load=folder")


def _parameters(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    mapping = pytest.importorskip("spikingbrain_train.conversion.mapping")
    return {parameter.name: parameter.shape for parameter in mapping.model_parameters(model)}


@pytest.mark.parametrize("case", [*OTHER_WEIGHTS, *SAME_WEIGHTS])
def test_the_definition_agrees_with_the_table_of_parameters(case: str) -> None:
    stored, model, *_ = {**OTHER_WEIGHTS, **SAME_WEIGHTS}[case]
    assert (_parameters(stored) == _parameters(model)) == (case in SAME_WEIGHTS)


# One other value for every setting that is not weights; that of weights is in OTHER_WEIGHTS.
def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2
    if value is None:
        return 1.5
    if isinstance(value, Enum):
        return next(each for each in type(value) if each is not value)
    if isinstance(value, list) and value and isinstance(value[0], float):
        return [value[0] + 1]
    assert value == []
    return [Projection.qkv]


@pytest.mark.parametrize("name", [name for name, role in roles().items() if role is not Role.weights])
def test_no_setting_but_those_of_weights_changes_a_parameter(name: str) -> None:
    everything = replace(EXPERTS, mixers=[["gla", "swa"], "full"], spiking=SpikingConfig())
    section, _, leaf = name.rpartition(".")
    value = _other(leaves(everything)[name])
    changed = (
        replace(everything, **{section: replace(getattr(everything, section), **{leaf: value})})
        if section
        else replace(everything, **{leaf: value})
    )
    assert _parameters(everything) == _parameters(changed)
    check_same_weights(everything, changed, "checkpoint.load=folder")


def test_a_dense_source_has_the_sizes_of_what_was_made_of_it() -> None:
    hybrid = replace(EXPERTS, mixers=[["gla", "swa"]], num_sink_tokens=4)
    check_same_sizes(replace(MODEL, mixers=["full"]), hybrid, "stage.teacher=folder")
    with pytest.raises(CheckpointError, match=r"stage\.teacher=folder holds a model with hidden_size=32"):
        check_same_sizes(replace(MODEL, hidden_size=32), hybrid, "stage.teacher=folder")


def test_settings_without_a_part_in_the_model_are_left_out() -> None:
    assert not {name for name in settings_in_use(MODEL) if name.startswith(("moe.", "parallel_hybrid."))}
    assert "sliding_window" not in settings_in_use(replace(MODEL, mixers=["gla", "full"]))
    assert "gla.gate_low_rank_dim" not in settings_in_use(replace(MODEL, gla=TIED))
    assert "spiking.gate_encoding" not in settings_in_use(MODEL)
    spiking = SpikingConfig([Projection.gate])
    assert "spiking.gate_encoding" in settings_in_use(replace(MODEL, spiking=spiking))
