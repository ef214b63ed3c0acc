"""The loop, its stages and callbacks, optimizer, metrics. See :mod:`~spikingbrain_train.training.trainer`."""

from __future__ import annotations

import os

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.reporting.activity import activity


def run(config: RunConfig) -> None:
    """Train one stage as the config says; see :func:`spikingbrain_train.training.trainer.run`."""
    # Imported here because it brings torch and megatron-core, which drawing a loss curve does not need.
    with activity("importing torch and megatron-core", shown=os.environ.get("RANK", "0") == "0"):
        from spikingbrain_train.training import trainer

    trainer.run(config)
