"""Which mixers an align stage trains."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from spikingbrain_train.architecture.layers import dense_source
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.training.stages.alignment import Alignment
from tests.distributed.small_runs import MODEL


def replaced(model: ModelConfig) -> list[int]:
    student: Any = SimpleNamespace(model_config=model)
    teacher: Any = SimpleNamespace(model_config=dense_source(model), chunks=["its only stage"])
    groups: Any = SimpleNamespace(pipeline_model_parallel_size=1)
    return Alignment(StageConfig(kind="align"), groups, teacher).replaced_layers(student)


def test_layers_that_keep_the_teachers_mixer_are_not_trained() -> None:
    assert replaced(replace(MODEL, mixers=["gla", "swa", ["gla", "full"], "full"])) == [0, 1, 2]


def test_a_model_with_the_teachers_mixers_has_nothing_to_train() -> None:
    with pytest.raises(ConfigurationError, match="every layer of the model has the teacher's mixer"):
        replaced(replace(MODEL, mixers=["full"]))
