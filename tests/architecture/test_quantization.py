"""Settings of INT8 weights that cannot work are refused with a sentence that says what would."""

from __future__ import annotations

from typing import Any

import pytest

from spikingbrain_train.architecture.linear_transforms import transforms_of, without_transforms
from spikingbrain_train.architecture.model_checks import check_linear_transforms
from spikingbrain_train.architecture.quantization import INT8_WEIGHTS
from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import QuantizationAnnealingConfig, StageConfig
from spikingbrain_train.errors import ConfigurationError

EVERYWHERE = list(Projection)


def model(
    projections: list[Projection] = EVERYWHERE, group_size: int = 64, mixers: tuple[Any, ...] = ("gla", "swa")
) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        hidden_size=192,
        ffn_hidden_size=256,
        num_attention_heads=3,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=64,
        max_position_embeddings=64,
        mixers=list(mixers),
        quantization=QuantizationConfig(projections, group_size),
    )


def check(of: ModelConfig, anneal_iters: int = 0) -> None:
    stage = StageConfig(
        train_iters=100, quantization_annealing=QuantizationAnnealingConfig(anneal_iters=anneal_iters)
    )
    check_fields(of.quantization, "model.quantization.")
    check_fields(stage.quantization_annealing, "stage.quantization_annealing.")
    check_linear_transforms(of, stage)


def test_what_works_is_let_through() -> None:
    check(model())
    check(model(), anneal_iters=100)
    check(model([], 128))
    check(model([Projection.mlp_fc2], 128))  # 256 inputs; what is not quantised has no groups
    check(model([Projection.gate], 192))  # the second matrix of a gate, 16 wide, is one group


def test_groups_divide_the_input_of_every_projection() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"model.quantization.group_size=128 does not divide the 192 inputs of .*; what divides "
        r"those of all projections is 1, 2, 4, 8, 16, 32 or 64",
    ):
        check(model(group_size=128))


def test_a_projection_is_listed_once() -> None:
    with pytest.raises(ConfigurationError, match="model.quantization.projections lists qkv more than once"):
        check(model([Projection.qkv, Projection.qkv]))


def test_int8_weights_of_a_gate_need_one() -> None:
    with pytest.raises(ConfigurationError, match="no layer has a low-rank gate or an output gate; take gate"):
        check(model(mixers=("swa",)))


def test_annealing_needs_weights_and_ends_within_the_stage() -> None:
    with pytest.raises(ConfigurationError, match="anneal_iters=5 anneals quantised weights .* are empty"):
        check(model([]), anneal_iters=5)
    with pytest.raises(ConfigurationError, match="must be at most stage.train_iters=100"):
        check(model(), anneal_iters=101)


def test_the_share_rises_on_a_line_and_stays() -> None:
    def share(anneal_iters: int, iteration: int) -> float:
        stage = StageConfig(quantization_annealing=QuantizationAnnealingConfig(anneal_iters))
        return INT8_WEIGHTS.schedule(model(), stage, iteration)["share"]

    assert [share(4, iteration) for iteration in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert share(0, 0) == 1.0


def test_int8_weights_stand_behind_spikes_and_can_be_taken_off() -> None:
    both = model()
    both.spiking = SpikingConfig(projections=EVERYWHERE)
    both.quantization.keys_and_values = True
    assert [kind.name for kind in transforms_of(both)] == ["spiking", "quantization"]
    plain = without_transforms(both)
    assert not transforms_of(plain) and not plain.quantization.keys_and_values
