"""What nobody knows, a kind or the value of a setting, is an error and never taken for one of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, TypeVar

import pytest

from spikingbrain_train.architecture.model_checks import check_linear_transforms
from spikingbrain_train.architecture.same_architecture import check_same_weights
from spikingbrain_train.config.conversion import UpcyclingForm
from spikingbrain_train.config.model import (
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
)
from spikingbrain_train.config.parallel import (
    ParallelConfig,
    ParallelLinearBackend,
    Recompute,
)
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.conversion.formats.registry import format_of_model, unsupported
from spikingbrain_train.conversion.mapping import model_parameters
from spikingbrain_train.conversion.report import describe_layers
from spikingbrain_train.conversion.upcycling import expert_scale
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
from spikingbrain_train.models.transformer_config import transformer_config
from spikingbrain_train.planning import activations, costs, memory
from spikingbrain_train.planning.checks import check_stage
from spikingbrain_train.planning.file_checks import check_teacher
from spikingbrain_train.planning.kernel_calls import mixer_calls
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.training.stages.build import stage_class

Kind = TypeVar("Kind", bound=Enum)


def foreign(kinds: type[Kind]) -> Kind:
    """A member that the enum does not have: what tomorrow brings."""
    member = str.__new__(kinds, "foreign")  # type: ignore[type-var]
    member._name_, member._value_ = "foreign", "foreign"
    return member


MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    max_position_embeddings=64,
    mixers=["gla", "swa"],
    sliding_window=8,
    moe=MoEConfig(num_experts=4),
)
STAGE = StageConfig(train_iters=2, seq_length=16, global_batch_size=2)
RUN = RunConfig(model=MODEL, stage=STAGE, precision=Precision.fp32, output_dir="unused")

MIXER = FEED_FORWARD = "foreign"
WITH_MIXER = replace(MODEL, mixers=[MIXER, "swa"])
WITH_FEED_FORWARD = replace(MODEL, feed_forwards=[FEED_FORWARD])
WITH_GATE = replace(MODEL, gla=GatedLinearAttentionConfig(gate=foreign(GateKind)))
WITH_STAGE = replace(RUN, stage=replace(STAGE, kind="foreign"))
WITH_RECOMPUTE = replace(
    RUN,
    model=replace(MODEL, feed_forwards=["moe"]),
    parallel=ParallelConfig(recompute=foreign(Recompute)),
)

ASKED: dict[str, Callable[[], Any]] = {
    "mixer: new parameters": lambda: costs.new_parameters(WITH_MIXER),
    "mixer: plan": lambda: plan_run(replace(RUN, model=WITH_MIXER), 1),
    "mixer: weight mapping": lambda: list(model_parameters(WITH_MIXER)),
    "mixer: export": lambda: format_of_model(WITH_MIXER),
    "mixer: report": lambda: describe_layers(WITH_MIXER),
    "mixer: same weights": lambda: check_same_weights(WITH_MIXER, WITH_MIXER, "a folder"),
    "mixer: spikes": lambda: check_linear_transforms(WITH_MIXER, STAGE),
    "feed-forward: plan": lambda: plan_run(replace(RUN, model=WITH_FEED_FORWARD), 1),
    "feed-forward: weight mapping": lambda: list(model_parameters(WITH_FEED_FORWARD)),
    "feed-forward: export": lambda: unsupported(WITH_FEED_FORWARD),
    "gate: parameters": lambda: costs.new_parameters(WITH_GATE),
    "gate: weight mapping": lambda: list(model_parameters(WITH_GATE)),
    "gate: plan": lambda: plan_run(replace(RUN, model=WITH_GATE), 1),
    "gate: spikes": lambda: check_linear_transforms(WITH_GATE, STAGE),
    "upcycling: scales": lambda: expert_scale(foreign(UpcyclingForm), 1.25, "mlp_up_weight"),
    "linears: classes": lambda: ParallelLinears(foreign(ParallelLinearBackend)),
    "recomputation: activations": lambda: activations.activation_bytes(WITH_RECOMPUTE, 0, 1),
    "recomputation: settings": lambda: transformer_config(
        MODEL, WITH_RECOMPUTE.parallel, Precision.fp32, on_cpu=True
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_unknown_kind_is_an_error(asked: str) -> None:
    with pytest.raises((NotImplementedError, ConfigurationError)) as error:
        ASKED[asked]()
    assert "foreign is not known where" in str(error.value) or "foreign, which is no" in str(error.value)


ASKED_OF_STAGE: dict[str, Callable[[], Any]] = {
    "plan": lambda: plan_run(WITH_STAGE, 1),
    "memory": lambda: memory.estimate_memory(WITH_STAGE, 0, 1, 1),
    "checks": lambda: check_stage(WITH_STAGE.stage, MODEL, ParallelConfig(), 1),
    "teacher": lambda: check_teacher(WITH_STAGE),
    "kernels": lambda: list(mixer_calls(WITH_STAGE)),
    "training": lambda: stage_class(WITH_STAGE.stage),
}


@pytest.mark.parametrize("asked", ASKED_OF_STAGE)
def test_an_unknown_kind_of_stage_is_an_error_that_names_the_known_ones(asked: str) -> None:
    with pytest.raises(
        ConfigurationError, match="stage.kind names foreign, .* known are align, cpt, distill, sft;"
    ):
        ASKED_OF_STAGE[asked]()


@pytest.mark.parametrize("kinds", [GateKind], ids=lambda kinds: kinds.__name__)
def test_every_member_has_its_traits(kinds: type[Enum]) -> None:
    for kind in kinds:
        properties = [name for name, value in vars(kinds).items() if isinstance(value, property)]
        assert properties and all(getattr(kind, name) is not ... for name in properties)
