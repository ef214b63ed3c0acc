"""Every kind of stage by the name that ``stage.kind`` calls it."""

from __future__ import annotations

from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.planning.stages.align import AlignmentKind
from spikingbrain_train.planning.stages.cpt import ContinualPretrainingKind
from spikingbrain_train.planning.stages.distill import DistillationKind
from spikingbrain_train.planning.stages.kind import StageKind
from spikingbrain_train.planning.stages.sft import SupervisedFineTuningKind

STAGES: Registry[StageKind] = Registry("kind of stage", "stage.kind")
STAGES.register(AlignmentKind())
STAGES.register(DistillationKind())
STAGES.register(ContinualPretrainingKind())
STAGES.register(SupervisedFineTuningKind())


def kind_of(stage: StageConfig) -> StageKind:
    """What ``stage.kind`` names. Raises ConfigurationError where no kind has that name."""
    return STAGES[stage.kind]
