"""Names that have moved: the room checkpoint, and training/training_state.py."""

from spikingbrain_train.training.training_state import TrainingState

__all__ = ["TrainingState"]
