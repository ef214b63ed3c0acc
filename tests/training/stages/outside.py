"""A kind of stage as another package would bring it: what plans know of it. No torch."""

from __future__ import annotations

from spikingbrain_train.planning.stages.cpt import ContinualPretrainingKind
from spikingbrain_train.planning.stages.registry import STAGES


class OutsideKind(ContinualPretrainingKind):
    """Continual pretraining that leaves the embedding alone."""

    name = "outside"
    trained_by = "tests.training.stages.outside_training:FrozenEmbedding"


STAGES.register(OutsideKind())
