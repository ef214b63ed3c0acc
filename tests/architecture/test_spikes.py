"""Spike settings that cannot work are refused with a sentence that says what would."""

from __future__ import annotations

from typing import Any

import pytest

from spikingbrain_train.architecture.model_checks import check_linear_transforms
from spikingbrain_train.architecture.spikes import SPIKES
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import FeatureMap, GatedLinearAttentionConfig, GateKind, ModelConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.stage import SpikeAnnealingConfig, StageConfig
from spikingbrain_train.errors import ConfigurationError

EVERYWHERE = list(Projection)


def check(
    projections: list[Projection] = EVERYWHERE,
    k: float = 3.0,
    init_k: float | None = None,
    anneal_iters: int = 0,
    mixers: tuple[Any, ...] = ("gla",),
    gate: GateKind = GateKind.low_rank,
) -> None:
    gla = GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=gate)
    spiking = SpikingConfig(projections=projections, k=k)
    model = ModelConfig(num_layers=2, mixers=list(mixers), gla=gla, spiking=spiking)
    stage = StageConfig(train_iters=100, spike_annealing=SpikeAnnealingConfig(init_k, anneal_iters))
    check_fields(spiking, "model.spiking.")
    check_fields(stage.spike_annealing, "stage.spike_annealing.")
    check_linear_transforms(model, stage)


def test_what_works_is_let_through() -> None:
    check()
    check(projections=[], k=3.0)
    check(init_k=24.0, anneal_iters=100)
    check(mixers=("full", ["gla", "swa"]))
    check(projections=[Projection.qkv], mixers=("full",))


@pytest.mark.parametrize("k", [0.0, -3.0])
def test_a_threshold_needs_a_positive_k(k: float) -> None:
    with pytest.raises(ConfigurationError, match="model.spiking.k=.* must be greater than 0"):
        check(k=k)


def test_a_projection_is_listed_once() -> None:
    with pytest.raises(ConfigurationError, match="lists qkv more than once"):
        check(projections=[Projection.qkv, Projection.qkv])


@pytest.mark.parametrize(
    ("mixers", "gate"), [(("swa",), GateKind.low_rank), (("gla",), GateKind.tied)], ids=str
)
def test_spikes_in_front_of_a_gate_need_one(mixers: tuple[Any, ...], gate: GateKind) -> None:
    with pytest.raises(
        ConfigurationError, match="no layer has a low-rank gate or an output gate; take gate out"
    ):
        check(mixers=mixers, gate=gate)


def test_annealing_needs_a_start_above_the_end() -> None:
    with pytest.raises(ConfigurationError, match="anneal_iters=10 needs stage.spike_annealing.init_k"):
        check(anneal_iters=10)
    for init_k in (2.0, 3.0, 0.0, -1.0):
        with pytest.raises(ConfigurationError, match="must be above model.spiking.k=3.0"):
            check(init_k=init_k, anneal_iters=10)


@pytest.mark.parametrize("anneal_iters", [0, 101])
def test_annealing_ends_within_the_stage(anneal_iters: int) -> None:
    with pytest.raises(ConfigurationError, match="must be between 1 and stage.train_iters=100"):
        check(init_k=24.0, anneal_iters=anneal_iters)


def test_annealing_steps_are_not_negative() -> None:
    with pytest.raises(ConfigurationError, match="anneal_iters=-1 must be at least 0"):
        check(anneal_iters=-1)


def test_annealing_without_spikes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="model.spiking.projections is empty"):
        check(projections=[], init_k=24.0, anneal_iters=10)


def k_at(annealing: SpikeAnnealingConfig, iteration: int) -> float:
    model = ModelConfig(spiking=SpikingConfig(k=3.0))
    (k,) = SPIKES.schedule(model, StageConfig(spike_annealing=annealing), iteration).values()
    return k


def test_k_shrinks_by_the_same_factor_every_step_until_it_is_final() -> None:
    values = [k_at(SpikeAnnealingConfig(init_k=48.0, anneal_iters=4), iteration) for iteration in range(7)]
    assert values == pytest.approx([48.0, 24.0, 12.0, 6.0, 3.0, 3.0, 3.0])
    assert values[4:] == [3.0, 3.0, 3.0], "exactly the model's k from then on"


def test_without_annealing_k_is_the_models_from_the_first_step() -> None:
    assert k_at(SpikeAnnealingConfig(), 0) == 3.0
