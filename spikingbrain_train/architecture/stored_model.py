"""The model that lies in the folder of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.architecture.model_checks import check_kinds
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE


def read_stored_model(checkpoint: Path) -> ModelConfig:
    """Read a checkpoint's ``model_config.yaml``, whose kinds have to be known.

    Raises:
        CheckpointError: the file cannot be read, or names kinds that neither the package nor a plugin brings;
            the sentence names it.
    """
    path = checkpoint / MODEL_CONFIG_FILE
    model = load_model_config(path)
    try:
        check_kinds(model)
    except ConfigurationError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model
