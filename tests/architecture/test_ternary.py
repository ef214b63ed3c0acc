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
from spikingbrain_train.architecture.q8_inputs import Q8_INPUTS
from spikingbrain_train.architecture.ternary import TERNARY_WEIGHTS
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    Q8InputsConfig,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import QuantizationAnnealingConfig, StageConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.parallel_checks import check_split

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
    check_fields(of.q8_inputs, "model.q8_inputs.")
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


def in_blocks(*projections: Projection, **others: Any) -> ModelConfig:
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 24}
    settings = sizes | {"ffn_hidden_size": 512, "mixers": ("full",), "ternary": [], "int8_inputs": []}
    return model(**settings | others, q8_inputs=Q8InputsConfig(list(projections)))


def test_blocks_of_inputs_are_whole_in_a_projection_and_on_a_rank() -> None:
    fc2 = Projection.mlp_fc2
    check(in_blocks(Projection.qkv, Projection.attention_output, fc2), anneal_iters=1)
    with pytest.raises(ConfigurationError, match="lists qkv, which reads 48 inputs, but blocks of 32 do not"):
        check(in_blocks(Projection.qkv, hidden_size=48))
    with pytest.raises(ConfigurationError, match="model.int8_inputs.projections and model.q8_inputs.proj.*"):
        check(in_blocks(fc2, int8_inputs=[fc2]))
    tensor = [ParallelConfig(tensor_model_parallel_size=ranks) for ranks in (1, 2, 4)]
    for parallel in tensor[:2]:
        check_split(in_blocks(Projection.qkv, Projection.mlp_fc1, fc2), parallel)
    with pytest.raises(
        ConfigurationError,
        match="size=4 gives a rank 128 of the 512 inputs of mlp_fc2, which are no whole blocks of 256, "
        "as model.q8_inputs.projections asks for; valid is 1 or 2, or take mlp_fc2 out",
    ):
        check_split(in_blocks(fc2), tensor[2])
    with pytest.raises(ConfigurationError, match="a rank 48 of the 96 inputs of attention_output"):
        check_split(in_blocks(Projection.attention_output), tensor[1])
    experts = {"feed_forwards": ["moe"], "moe": MoEConfig(num_experts=2, moe_ffn_hidden_size=96)}
    split = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2
    )
    with pytest.raises(ConfigurationError, match="parallel.expert_tensor_parallel_size=2 gives a rank 48 of"):
        check_split(in_blocks(fc2, **experts), split)


def test_annealing_ends_within_the_stage_and_needs_something_to_anneal() -> None:
    with pytest.raises(ConfigurationError, match="must be at most stage.train_iters=100"):
        check(model(), anneal_iters=101)
    with pytest.raises(ConfigurationError, match="model.ternary.projections are empty; name the projections"):
        check(model(ternary=[], int8_inputs=[]), anneal_iters=1)


@pytest.mark.parametrize("kind", [TERNARY_WEIGHTS, INT8_INPUTS, Q8_INPUTS])
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
