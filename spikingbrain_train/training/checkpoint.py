"""Saving and restoring a run: weights, optimizer, schedule, generators and data position, at any topology.

A checkpoint is written under a temporary name and renamed when every rank is done and all of it is on the
disk, and only then does ``latest_checkpointed_iteration.txt`` point to it: after an interrupted save or a
power loss the previous one is in force. What is not finite is not saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from spikingbrain_train.architecture.same_architecture import check_same_weights
from spikingbrain_train.config.load import load_model_config, save_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import RunRecord, write_record
from spikingbrain_train.errors import CheckpointError, NumericalError
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.agreement import FAILED_ELSEWHERE, Failure, agreed_failure
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.resume import (
    StoredRun,
    check_settings,
    check_training_data,
    is_same_topology,
    read_stored_run,
)
from spikingbrain_train.runtime import megatron_versions
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    MODEL_CONFIG_FILE,
    RUN_CONFIG_FILE,
    advice_to_go_back,
    incomplete_folder,
    iteration_folder,
    iteration_of,
    iterations,
    latest_checkpoint,
    latest_iteration,
    remove_incomplete,
    set_aside,
    set_latest_iteration,
)
from spikingbrain_train.storage.checkpoint_manifest import Parts, write_manifest
from spikingbrain_train.storage.durable_files import rename_durably, sync_tree
from spikingbrain_train.training.current_weights import gather_updated_weights
from spikingbrain_train.training.finite_checks import first_not_finite_of_run, way_back
from spikingbrain_train.training.optimizer_state import load_state, state_to_load

_FULL_BYTES = 1 << 20  # below what the smallest file of weights takes


def _sharding() -> dict[str, Any]:
    """How tensors are named and split: per-layer keys, because layers differ, and optimizer state as whole
    parameters, so that any topology can read it. A new dict each time: megatron-core puts this run's process
    groups into it.
    """
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


@dataclass
class TrainingState:
    """What changes while a run trains."""

    data_parallel: DistributedDataParallel
    """This rank's pipeline stage, as it trains."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences read from the training data so far."""

    @property
    def model(self) -> HybridGPTModel:
        """This rank's pipeline stage itself."""
        return self.data_parallel.module


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    config: RunConfig,
    record: RunRecord,
    groups: ProcessGroups,
    hf_source: Path | None,
) -> Path:
    """Write ``<folder>/iter_<iteration>`` from all ranks and make it the newest.

    Args:
        folder: checkpoint folder of the run.
        state: what to write.
        config: stored beside the weights.
        record: of this run, likewise.
        groups: process groups.
        hf_source: folder with the source's configuration and tokenizer, copied along for the export; None to
            leave out.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; earlier checkpoints are untouched.
        NumericalError: a weight, a main weight or an optimizer moment is NaN or infinite; nothing is written.
    """
    gather_updated_weights(state.data_parallel)
    if spoiled := first_not_finite_of_run(state.model, state.optimizer, groups):
        raise NumericalError(
            f"iteration {state.iteration} is not saved, because it holds NaN or infinity ({spoiled}); "
            f"{way_back(folder)}."
        )
    final = iteration_folder(folder, state.iteration)
    temporary = incomplete_folder(final)
    with _failing_together(temporary, groups):
        if groups.is_main_process:
            remove_incomplete(folder)
            temporary.mkdir(parents=True)
    with _failing_together(temporary, groups):
        megatron_versions.save_checkpoint(_sharded_state(state, groups, is_loading=False), temporary)
    checksums: dict[str, Parts] = {}
    with _failing_together(temporary, groups):
        checksums = megatron_versions.checksums_of_rank(temporary)
    gathered: list[dict[str, Parts]] | None = [{}] * groups.world_size if groups.is_main_process else None
    torch.distributed.gather_object(checksums, gathered)
    with _failing_together(temporary, groups):
        if gathered is not None:
            write_manifest(temporary, {name: parts for each in gathered for name, parts in each.items()})
            save_config(config, temporary / RUN_CONFIG_FILE)
            write_record(record, temporary)
            save_config(state.model.model_config, temporary / MODEL_CONFIG_FILE)
            if hf_source is not None:
                # Links stay links: no file from elsewhere moves into the checkpoint.
                shutil.copytree(hf_source, temporary / HF_SOURCE_FOLDER, symlinks=True)
            sync_tree(temporary)
            if final.exists():  # of another life of this run: only who wrote it may remove it
                set_aside(final)
            rename_durably(temporary, final)
            set_latest_iteration(folder, state.iteration)
    return final


@contextmanager
def _failing_together(temporary: Path, groups: ProcessGroups) -> Iterator[None]:
    """Let all ranks fail when one could not write, and clean up: with one sentence where the storage is at
    fault; from anything else the rank that met it goes on to raise that itself.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as met:
        error = met
    agreed = agreed_failure(None if error is None else _failure(error, temporary.parent), groups)
    if agreed is None:
        return
    if groups.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    if agreed.of_storage:
        raise CheckpointError(
            f"the checkpoint {temporary.parent} cannot be written ({agreed.describe()}); free space there or "
            "choose another output_dir. Earlier checkpoints are untouched."
        ) from error
    if error is not None and not isinstance(error, _TOLD):
        raise error
    raise CheckpointError(
        f"no checkpoint is written to {temporary.parent}, because of {agreed.describe()}; mend that and "
        "start again. Earlier checkpoints are untouched."
    ) from error


_TOLD = (megatron_versions.FailedElsewhere, megatron_versions.FailedOnRank)
"""Failures of ranks that may not be this one."""


def _failure(error: Exception, folder: Path) -> Failure:
    """What a rank tells the others of an exception that it met while writing to ``folder``."""
    if isinstance(error, megatron_versions.FailedElsewhere):
        return Failure(FAILED_ELSEWHERE)
    rank, reason, of_storage = None, _reason(error), _is_of_storage(error)
    if isinstance(error, megatron_versions.FailedOnRank):
        rank, reason = error.rank, error.reason.splitlines()[0]
    if _is_full(folder):  # megatron-core 0.19 does not say so
        reason, of_storage = f"the disk is full, {reason}", True
    return Failure(reason, rank, of_storage)


def _is_of_storage(error: Exception) -> bool:
    if isinstance(error, megatron_versions.FailedOnRank):  # while its writers worked
        return not isinstance(error.cause, torch.OutOfMemoryError)
    if isinstance(error, (OSError, CheckpointingException, CheckpointError)):
        return True
    # What torch.save says on a full disk is a RuntimeError like any other.
    return any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_BYTES
    except OSError:
        return False


def prune_checkpoints(folder: Path, keep_last: int | None, groups: ProcessGroups) -> None:
    """Remove all but the ``keep_last`` newest checkpoints of the run, never the one that counts as newest."""
    if keep_last is None or not groups.is_main_process:
        return
    kept = latest_iteration(folder)
    for iteration in iterations(folder)[:-keep_last]:
        if iteration != kept:
            shutil.rmtree(iteration_folder(folder, iteration), ignore_errors=True)


def load_weights(folder: str, setting: str, model: HybridGPTModel) -> None:
    """Fill ``model`` from the newest checkpoint in ``folder``, whatever topology wrote it.

    Args:
        folder: checkpoint folder.
        setting: the config setting that named it, for error messages.
        model: this rank's stage, already built.

    Raises:
        CheckpointError: it is missing, damaged or of another architecture.
    """
    checkpoint = latest_checkpoint(folder, setting)
    stored = load_model_config(checkpoint / MODEL_CONFIG_FILE)
    check_same_weights(stored, model.model_config, f"{setting}={folder}")
    loaded = _load({"model": _sharded_weights(model)}, checkpoint, setting)
    _fill(model, loaded["model"])


def resume(folder: Path, state: TrainingState, config: RunConfig, groups: ProcessGroups) -> StoredRun:
    """Restore everything from the run's newest checkpoint, at this or another topology.

    Returns:
        The run as it was when it wrote that checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, of another architecture, or of a run whose optimizer state
            has another form.
    """
    checkpoint = latest_checkpoint(folder, "output_dir")
    stored = read_stored_run(checkpoint)
    check_settings(stored, config)
    check_training_data(stored, config)
    same_topology = is_same_topology(stored, config, groups.world_size)
    loaded = _load(
        _sharded_state(state, groups, is_loading=True, same_topology=same_topology),
        checkpoint,
        "output_dir",
    )
    _fill(state.model, loaded["model"])
    load_state(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.iteration = loaded["iteration"]
    state.consumed_samples = loaded["consumed_samples"]
    if "generators" in loaded:
        _restore_generators(loaded["generators"], groups)
    if spoiled := first_not_finite_of_run(state.model, state.optimizer, groups):
        raise CheckpointError(
            f"output_dir: the checkpoint {checkpoint} holds NaN or infinity ({spoiled}); "
            f"{_advice(checkpoint)}"
        )
    return stored


def _sharded_state(
    state: TrainingState, groups: ProcessGroups, *, is_loading: bool, same_topology: bool = True
) -> dict[str, Any]:
    model = _sharded_weights(state.model)
    sharded: dict[str, Any] = {
        "model": model,
        "optimizer": state_to_load(state.optimizer, model, _sharding())
        if is_loading
        else state.optimizer.sharded_state_dict(model, metadata=_sharding()),
        "scheduler": state.scheduler.state_dict(),
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
    }
    if same_topology:
        sharded["generators"] = _generators(groups)
    return sharded


def _sharded_weights(model: HybridGPTModel) -> dict[str, Any]:
    """The weights without the ``_extra_state`` objects of Transformer Engine's FP8 recipes, which we do not
    use: the weights of a checkpoint are tensors only.
    """
    sharded = model.sharded_state_dict(metadata=_sharding())
    return {name: value for name, value in sharded.items() if not name.endswith("_extra_state")}


def _fill(model: HybridGPTModel, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, f"weights do not fit the model: {missing} {unexpected}"


def _generators(groups: ProcessGroups) -> dict[str, ShardedTensor]:
    """Every rank's random generators as rows of one tensor each."""
    states = {f"torch_{name}": value for name, value in groups.accelerator.get_rng_state().items()}
    states |= {f"tracker_{name}": value for name, value in get_cuda_rng_tracker().get_states().items()}
    return {
        name: ShardedTensor.from_rank_offsets(
            f"generators.{name}", value.cpu()[None], (0, groups.rank, groups.world_size)
        )
        for name, value in states.items()
    }


def _restore_generators(rows: dict[str, torch.Tensor], groups: ProcessGroups) -> None:
    states = {name: row.squeeze(0) for name, row in rows.items()}
    groups.accelerator.set_rng_state(
        {name.removeprefix("torch_"): value for name, value in states.items() if name.startswith("torch_")}
    )
    get_cuda_rng_tracker().set_states(
        {
            name.removeprefix("tracker_"): value
            for name, value in states.items()
            if name.startswith("tracker_")
        }
    )


def _load(sharded: dict[str, Any], checkpoint: Path, setting: str) -> dict[str, Any]:
    try:
        return megatron_versions.load_checkpoint(sharded, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{setting}: {error}; {_advice(checkpoint)}") from error
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{setting}: the checkpoint {checkpoint} cannot be read ({_reason(error)}); it is damaged or of "
            f"another architecture; {_advice(checkpoint)}"
        ) from error


def _advice(checkpoint: Path) -> str:
    return advice_to_go_back(checkpoint.parent, iteration_of(checkpoint))


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where it did."""
    if isinstance(error, CheckpointException) and error.failures:  # torch's collection of what each rank met
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__
