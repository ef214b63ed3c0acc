"""The tokenizer of a run's text, for evaluators that ask its model in words. Without torch."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import HF_SOURCE_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.tokenizer_files import has_tokenizer


def tokenizer_of_run(config: RunConfig) -> Path:
    """``data.tokenizer``, or that which travels with the checkpoint that the run starts from.

    Raises:
        ConfigurationError: there is neither.
    """
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    if config.checkpoint.load is not None:
        try:
            folder = resolve_checkpoint(Path(config.checkpoint.load), "checkpoint.load") / HF_SOURCE_FOLDER
        except CheckpointError:  # a run that goes on may do without the one that it began from
            folder = Path()
        if has_tokenizer(folder):
            return folder
    raise ConfigurationError(
        "logging.evaluators names one that asks the model in words, but the run has no tokenizer, and its "
        "checkpoint carries none; name its folder with data.tokenizer"
    )
