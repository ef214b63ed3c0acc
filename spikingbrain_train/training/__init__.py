"""The loop, its stages, optimizer, checkpoints and metrics. Read :mod:`~spikingbrain_train.training.trainer` first."""

from spikingbrain_train.training.trainer import run

__all__ = ["run"]
