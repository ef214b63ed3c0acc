"""The class that trains a kind of stage."""

from __future__ import annotations

from spikingbrain_train.config.import_path import object_of_kind
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.training.stages.stage import Stage


def stage_class(stage: StageConfig) -> type[Stage]:
    """What trains ``stage.kind``.

    Raises:
        ConfigurationError: no kind has that name, or its class cannot be imported.
    """
    return object_of_kind(kind_of(stage).trained_by, f"stage.kind={stage.kind}")
