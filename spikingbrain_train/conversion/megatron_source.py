"""A Megatron checkpoint as the source of a conversion: its architecture, and whether its tensors fit that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.mapping import model_parameters
from spikingbrain_train.conversion.safetensors_io import DTYPE_CODES
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.runtime.checkpoint_metadata import read_metadata
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE
from spikingbrain_train.storage.stored_layers import check_number_of_layers

_MODEL_PREFIXES = ("embedding.", "sink_embedding.", "decoder.", "output_layer.")


def read_model(folder: Path) -> ModelConfig:
    """The architecture of a checkpoint, which has tensors of as many layers.

    Raises:
        CheckpointError: model_config.yaml or ``.metadata`` is missing or damaged, or they contradict.
    """
    model = read_stored_model(folder)

    def tensors() -> Mapping[str, object]:
        return read_metadata(folder).state_dict_metadata

    check_number_of_layers(f"{folder / MODEL_CONFIG_FILE}: num_layers", model.num_layers, tensors)
    return model


def check_tensors(reader: MegatronCheckpointReader, model: ModelConfig) -> dict[str, torch.dtype]:
    """Hold the checkpoint's tensors against its model_config.yaml; return the dtype of each parameter."""
    dtypes = {}
    for parameter in model_parameters(model):
        entry = reader.tensors.get(parameter.name)
        if entry is None:
            raise CheckpointError(
                f"{reader.folder}: the parameter {parameter.name} is missing; {MODEL_CONFIG_FILE} describes "
                "another model"
            )
        rows, *columns = entry.size
        fits = rows >= parameter.shape[0] if parameter.weight.pads_vocabulary else rows == parameter.shape[0]
        if not fits or tuple(columns) != parameter.shape[1:]:
            raise CheckpointError(
                f"{reader.folder}: {parameter.name} has shape {list(entry.size)}, but {MODEL_CONFIG_FILE} "
                f"asks for {list(parameter.shape)}"
            )
        dtypes[parameter.name] = entry.properties.dtype
        if dtypes[parameter.name] not in DTYPE_CODES:
            raise CheckpointError(
                f"{reader.folder}: {parameter.name} has dtype {entry.properties.dtype}, which has no export"
            )
    for name in reader.tensors:
        if name.startswith(_MODEL_PREFIXES) and name not in dtypes:
            raise CheckpointError(
                f"{reader.folder}: the parameter {name} is not part of the model that {MODEL_CONFIG_FILE} "
                "describes; exporting without it would change the model"
            )
    return dtypes
