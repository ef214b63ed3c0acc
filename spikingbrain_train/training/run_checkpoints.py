"""Names that have moved to the room checkpoint."""

from spikingbrain_train.checkpoint.run_checkpoints import RunCheckpoints

__all__ = ["RunCheckpoints"]
