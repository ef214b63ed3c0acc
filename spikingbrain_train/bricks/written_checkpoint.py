"""A checkpoint made of another, parameter after parameter: adapters beside it or in it, more experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from spikingbrain_train.checkpoint.data_files import MegatronCheckpointWriter
from spikingbrain_train.config.derivation import Derivation
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.lineage import lineage
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    iteration_folder,
)


def write_checkpoint(
    output: Path,
    folder: Path,
    model: ModelConfig,
    value: Callable[[Parameter], Tensor],
    nbytes: int,
    *,
    overwrite: bool,
    did: str | None = None,
) -> None:
    """Write ``model`` at iteration 0, with the small files of the checkpoint in ``folder``.

    Args:
        output: folder to be made; it appears whole or not at all.
        folder: the ``iter_*`` folder that it is made of.
        model: the result's architecture.
        value: the values of a parameter.
        nbytes: that it will take, about.
        overwrite: replace an earlier result.
        did: what was done to the network, for the lineage; None leaves none.
    """
    check_output_folder(
        output,
        source=folder,
        overwrite=overwrite,
        marker=f"{iteration_folder('', 0)}/{MODEL_CONFIG_FILE}",
        needed_bytes=nbytes,
        dry_run=False,
    )
    with complete_folder(output, progress=False) as temporary:
        target = iteration_folder(temporary, 0)
        target.mkdir()
        if (folder / HF_SOURCE_FOLDER).is_dir():
            # Links stay links: no file from elsewhere moves into the checkpoint.
            shutil.copytree(folder / HF_SOURCE_FOLDER, target / HF_SOURCE_FOLDER, symlinks=True)
        save_config(model, target / MODEL_CONFIG_FILE)
        with MegatronCheckpointWriter(target) as writer:
            for parameter in model_parameters(model):
                tensor = value(parameter)
                writer.write_chunk(parameter.name, tensor.shape, (0,) * tensor.dim(), tensor)
        if did is not None:
            Derivation(
                did=did,
                sources=[str(folder)],
                history=history_with(folder),
                lineage=[asdict(step) for step in lineage(folder)],
            ).write(target)
        (temporary / LATEST_ITERATION_FILE).write_text("0", encoding="utf-8")
