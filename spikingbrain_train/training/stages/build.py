"""The class that trains a kind of stage."""

from __future__ import annotations

from spikingbrain_train.config.import_path import object_at
from spikingbrain_train.config.run import StageConfig
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.training.stages.stage import Stage


def stage_class(stage: StageConfig) -> type[Stage]:
    """What trains ``stage.kind``. Raises ConfigurationError where no kind has that name."""
    return object_at(kind_of(stage).trained_by)
