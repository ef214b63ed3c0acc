"""Reading checkpoints: a run that goes on, or weights alone, at any topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException

from spikingbrain_train.architecture.linear_transforms import is_stored
from spikingbrain_train.architecture.same_architecture import check_same_weights
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.finite_state import first_not_finite_of_run
from spikingbrain_train.checkpoint.sharded_state import (
    PipelineStage,
    RunState,
    fill_state,
    fill_weights,
    sharded_weights,
    state_to_fill,
)
from spikingbrain_train.checkpoint.torch_dist import load_shards
from spikingbrain_train.config.run import RunConfig, Verification
from spikingbrain_train.errors import CheckpointError, DamagedCheckpointError, first_line
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.resume import (
    StoredRun,
    check_settings,
    check_training_data,
    is_same_topology,
    read_stored_run,
)
from spikingbrain_train.storage.checkpoint_folder import (
    advice_to_go_back,
    is_iteration_folder,
    iteration_of,
    latest_checkpoint,
)


def load_weights(folder: str, setting: str, model: PipelineStage) -> None:
    """Fill ``model`` from the newest checkpoint in ``folder``, whatever topology wrote it.

    Args:
        folder: checkpoint folder.
        setting: the config setting that named it, for error messages.
        model: this rank's stage, already built.

    Raises:
        CheckpointError: it is missing, damaged or of another architecture.
    """
    load_weights_of(latest_checkpoint(folder, setting), f"{setting}={folder}", model)


def load_weights_of(checkpoint: Path, named: str, model: PipelineStage) -> None:
    """Fill ``model`` from one checkpoint, whatever topology wrote it; nothing but weights is read.

    Adapters that the checkpoint does not have stay as they are.

    Args:
        checkpoint: its ``iter_*`` folder.
        named: how the user named it, for error messages (``checkpoint.load=outputs/run/checkpoints``).
        model: this rank's stage, already built.

    Raises:
        CheckpointError: it is missing, damaged or of another architecture.
    """
    stored = read_stored_model(checkpoint)
    check_same_weights(stored, model.model_config, named)
    weights = {name: weight for name, weight in sharded_weights(model).items() if is_stored(name, stored)}
    loaded = _load({"model": weights}, checkpoint, named.partition("=")[0])
    fill_weights(model, loaded["model"])


def resume(folder: Path, state: RunState, config: RunConfig, groups: ProcessGroups) -> StoredRun:
    """Restore everything from the run's newest checkpoint, at this or another topology.

    Args:
        folder: checkpoint folder of the run.
        state: what to fill, already built.
        config: the run as it goes on.
        groups: process groups.

    Returns:
        The run as it was when it wrote that checkpoint.

    Raises:
        DamagedCheckpointError: it is not what was saved; ``state`` may be filled in part.
        CheckpointError: it is of another architecture, or of a run whose optimizer state has another form.
    """
    checkpoint = latest_checkpoint(folder, "output_dir")
    stored = read_stored_run(checkpoint)
    check_settings(stored, config)
    check_training_data(stored, config)
    same_topology = is_same_topology(stored, config, groups.world_size)
    to_fill = state_to_fill(state, groups, same_topology=same_topology)
    loaded = _load(to_fill, checkpoint, "output_dir", config.checkpoint.verification)
    fill_state(state, loaded, groups)
    _require_finite(state, checkpoint, groups)
    return stored


def take_back(checkpoint: Path, state: RunState, config: RunConfig, groups: ProcessGroups) -> None:
    """Give a run that goes on the weights and the optimizer state of a checkpoint that it has written.

    Step, schedule, position in the data, generators and callbacks stay where they are.

    Args:
        checkpoint: its ``iter_*`` folder.
        state: what to fill; no gather of updated weights is under way.
        config: the run.
        groups: process groups.

    Raises:
        DamagedCheckpointError: it is not what was saved; ``state`` may be filled in part.
    """
    loaded = _load(state.learnt_to_fill(), checkpoint, "output_dir", config.checkpoint.verification)
    state.fill_learnt(loaded)
    _require_finite(state, checkpoint, groups)


def _require_finite(state: RunState, checkpoint: Path, groups: ProcessGroups) -> None:
    if spoiled := first_not_finite_of_run(state.model, state.optimizer, groups):
        raise DamagedCheckpointError(
            f"output_dir: the checkpoint {checkpoint} holds NaN or infinity ({spoiled}); "
            f"{_advice(checkpoint)}"
        )


def _load(
    sharded: dict[str, Any], checkpoint: Path, setting: str, verification: Verification = Verification.full
) -> dict[str, Any]:
    try:
        return load_shards(sharded, checkpoint, verification)
    except CheckpointError as error:
        raise DamagedCheckpointError(f"{setting}: {error}; {_advice(checkpoint)}") from error
    except OSError as error:
        if not isinstance(error, FileNotFoundError):  # of the storage, which says nothing of what was stored
            raise CheckpointError(
                f"{setting}: the checkpoint {checkpoint} cannot be read ({first_line(error)}); mend that and "
                "start again"
            ) from error
        raise DamagedCheckpointError(
            f"{setting}: the checkpoint {checkpoint} is damaged ({first_line(error)}); {_advice(checkpoint)}"
        ) from error
    except (CheckpointingException, RuntimeError, KeyError, EOFError) as error:
        raise DamagedCheckpointError(
            f"{setting}: the checkpoint {checkpoint} cannot be read ({first_line(error)}); it is damaged or "
            f"of another architecture; {_advice(checkpoint)}"
        ) from error


def _advice(checkpoint: Path) -> str:
    if not is_iteration_folder(checkpoint):
        return "copy it again"
    return advice_to_go_back(checkpoint.parent, iteration_of(checkpoint))
