"""Ternary weights and INT8 inputs that cannot work are refused with a sentence that says what would."""

from __future__ import annotations

from typing import Any

import pytest

from spikingbrain_train.architecture.int8_inputs import INT8_INPUTS
from spikingbrain_train.architecture.linear_transforms import (
    transforms_of,
    with_plain_weights,
    without_transforms,
)
from spikingbrain_train.architecture.model_checks import check_linear_transforms
from spikingbrain_train.architecture.ternary import TERNARY_WEIGHTS
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import QuantizationAnnealingConfig, StageConfig
from spikingbrain_train.errors import ConfigurationError

EVERYWHERE = list(Projection)
SIZES = {
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "kv_channels", "vocab_size"), 8),
    **{"num_attention_heads": 1, "num_query_groups": 1, "max_position_embeddings": 8},
}


def model(
    ternary: list[Projection] = EVERYWHERE,
    int8_inputs: list[Projection] = EVERYWHERE,
    mixers: tuple[Any, ...] = ("gla",),
    **others: Any,
) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        mixers=list(mixers),
        ternary=TernaryConfig(ternary),
        int8_inputs=Int8InputsConfig(int8_inputs),
        **others,
    )


def check(of: ModelConfig, anneal_iters: int = 0) -> None:
    stage = StageConfig(train_iters=100, quantization_annealing=QuantizationAnnealingConfig(anneal_iters))
    check_fields(of.ternary, "model.ternary.")
    check_fields(of.int8_inputs, "model.int8_inputs.")
    check_linear_transforms(of, stage)


def test_what_works_is_let_through() -> None:
    check(model(), anneal_iters=100)
    check(model(ternary=[]), anneal_iters=1)
    check(model(int8_inputs=[], spiking=SpikingConfig(EVERYWHERE)), anneal_iters=1)
    others = [Projection.qkv, Projection.mlp_fc1]
    check(model(int8_inputs=[Projection.mlp_fc2], spiking=SpikingConfig(others)))


@pytest.mark.parametrize("name", ["ternary", "int8_inputs"])
def test_a_projection_is_listed_once_and_is_there(name: str) -> None:
    twice: Any = {name: [Projection.qkv, Projection.qkv]}
    with pytest.raises(ConfigurationError, match=f"model.{name}.projections lists qkv more than once"):
        check(model(**twice))
    gate: Any = {"ternary": [], "int8_inputs": [], name: [Projection.gate]}
    with pytest.raises(ConfigurationError, match=f"model.{name}.projections lists gate, but no layer has"):
        check(model(**gate, mixers=("swa",)))


def test_a_projection_has_one_kind_of_weights_and_of_inputs() -> None:
    int8 = QuantizationConfig([Projection.mlp_fc2], group_size=1)
    with pytest.raises(
        ConfigurationError,
        match="model.quantization.projections and model.ternary.projections both list mlp_fc2, whose weights",
    ):
        check(model(quantization=int8, **SIZES))
    with pytest.raises(
        ConfigurationError,
        match="model.spiking.projections and model.int8_inputs.projections both list qkv, whose inputs",
    ):
        check(model(spiking=SpikingConfig([Projection.qkv])))


def test_annealing_ends_within_the_stage_and_needs_something_to_anneal() -> None:
    with pytest.raises(ConfigurationError, match="must be at most stage.train_iters=100"):
        check(model(), anneal_iters=101)
    with pytest.raises(ConfigurationError, match="model.ternary.projections are empty; name the projections"):
        check(model(ternary=[], int8_inputs=[]), anneal_iters=1)


@pytest.mark.parametrize("kind", [TERNARY_WEIGHTS, INT8_INPUTS])
def test_the_share_rises_on_a_line_and_an_export_in_between_says_so(kind: Any) -> None:
    stage = StageConfig(quantization_annealing=QuantizationAnnealingConfig(4))
    shares = [kind.schedule(model(), stage, iteration)["share"] for iteration in range(6)]
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    said = kind.ahead_of(model(), stage, 1)
    assert f"its {kind.quantizes} were 25% of the way to {kind.numbers}" in said
    assert kind.ahead_of(model(), stage, 4) == ""


def test_spikes_and_inputs_stand_before_weights_and_can_be_taken_off() -> None:
    both = model()
    assert [kind.name for kind in transforms_of(both)] == ["int8_inputs", "ternary"]
    assert [kind.name for kind in transforms_of(with_plain_weights(both))] == ["int8_inputs"]
    assert not transforms_of(without_transforms(both))


@pytest.mark.parametrize("name", ["output_layer", "lm_head", "embedding"])
def test_the_vocabulary_projection_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        to_run_config(compose_run([f"model.ternary.projections=[qkv,{name}]", "dry_run=true"]))
    assert "\n" not in str(error.value)
    assert f"={name} does not fit: model.ternary.projections[1] takes one of qkv" in str(error.value)
    assert "embedding and vocabulary projection are no linears of a layer" in str(error.value)
