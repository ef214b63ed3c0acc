"""What a run that goes on may change since its checkpoint, decided beside every setting (config/setting.py).

Applied before torch is imported and again on loading. A setting that was changed on purpose takes effect,
with a word where it changes what the run computes, or is refused; none is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.layers import has_experts
from spikingbrain_train.architecture.same_architecture import settings_in_use
from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.run import Precision, Resume, RunConfig
from spikingbrain_train.config.run_record import (
    DatasetFingerprint,
    RunRecord,
    SamplesRead,
    blend_shares,
    read_record,
    training_data_of,
)
from spikingbrain_train.config.setting import OTHER_ORDER, OnChange, Role, decisions, leaves
from spikingbrain_train.config.shown import shown
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.costs import layers_per_stage
from spikingbrain_train.planning.sound_checkpoint import newest_sound
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    RUN_CONFIG_FILE,
    iteration_folder,
    iteration_of,
)


@dataclass(frozen=True)
class StoredRun:
    """The run that a checkpoint was written by."""

    checkpoint: Path
    """Its iteration's folder."""
    config: RunConfig
    record: RunRecord | None
    """None in checkpoints of earlier releases."""

    @property
    def iteration(self) -> int:
        """Optimizer steps done."""
        return iteration_of(self.checkpoint)

    @property
    def consumed_samples(self) -> int:
        """Sequences that its steps have read."""
        counted_from = SamplesRead() if self.record is None else self.record.counted_from
        return counted_from.at(self.iteration, self.config.stage.batch_sizes)

    @property
    def world_size(self) -> int:
        """Ranks that wrote it; earlier releases store the degrees of parallelism that nulls stood for."""
        if self.record is not None:
            return self.record.world_size
        parallel = self.config.parallel
        return parallel.model_parallel_size * (parallel.data_parallel_size or 1)


def read_stored_run(checkpoint: Path) -> StoredRun:
    """What a checkpoint says of the run that wrote it.

    Raises:
        CheckpointError: it says nothing, or its files are damaged.
    """
    path = checkpoint / RUN_CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {RUN_CONFIG_FILE}, so it is not of a run that could go on; name it as "
            f"checkpoint.load={checkpoint.parent} and choose another output_dir"
        )
    return StoredRun(checkpoint, load_run_config(path), read_record(checkpoint))


def run_to_resume(config: RunConfig) -> StoredRun | None:
    """The run that ``config`` goes on with, None where it starts.

    Raises:
        CheckpointError: what lies in its output_dir is damaged.
    """
    checkpoints = Path(config.output_dir) / CHECKPOINT_FOLDER
    if config.checkpoint.resume is Resume.never:
        return None
    newest = newest_sound(checkpoints, config.checkpoint.on_damage).newest
    return None if newest is None else read_stored_run(iteration_folder(checkpoints, newest))


def nothing_left(config: RunConfig, stored: StoredRun) -> str | None:
    """The sentence for a run that has no step left, None where it has."""
    wanted = config.stage.train_iters
    if stored.iteration < wanted:
        return None
    return (
        f"nothing is left to do: {stored.checkpoint} is at iteration {stored.iteration} of "
        f"stage.train_iters={wanted}; raise stage.train_iters to go on, or choose another output_dir to start"
        " anew"
    )


def topology(config: RunConfig, world_size: int) -> dict[str, Any]:
    """How ``world_size`` ranks share the work, with the values that nulls stand for."""
    parallel = config.parallel
    degrees = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "parallel.pipeline_model_parallel_layout": layers_per_stage(config.model, parallel),
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "parallel.data_parallel_size": world_size // parallel.model_parallel_size,
    }
    if has_experts(config.model):
        degrees["parallel.expert_model_parallel_size"] = parallel.expert_model_parallel_size
        degrees["parallel.expert_tensor_parallel_size"] = parallel.expert_tensor_size
    return degrees


def is_same_topology(stored: StoredRun, config: RunConfig, world_size: int) -> bool:
    """Whether every rank takes the place of one that wrote the checkpoint, whose generators it can have."""
    return topology(stored.config, stored.world_size) == topology(config, world_size)


def _settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Every setting that has a part in the run, as it is compared."""
    found = {
        name: value
        for name, value in leaves(config).items()
        if not name.startswith("model.") and not name.endswith("parallel_size")
    }
    found |= {f"model.{name}": value for name, value in settings_in_use(config.model).items()}
    found |= topology(config, world_size)
    if config.precision is Precision.auto:  # stands for whatever the run had
        del found["precision"]
    return found


def _refuse(stored: StoredRun, was: str, now: str, reason: str, new_run: bool = True) -> CheckpointError:
    instead = (
        f"start a new run from its weights with another output_dir and "
        f"checkpoint.load={stored.checkpoint.parent}"
    )
    return CheckpointError(
        f"{stored.checkpoint} was written with {was} and cannot be resumed with {now}: {reason}; restore the "
        f"setting, or {instead if new_run else 'choose another output_dir'}"
    )


def check_settings(stored: StoredRun, config: RunConfig) -> None:
    """Refuse settings that a run must keep. :func:`check_training_data` looks at the tokens.

    Raises:
        CheckpointError: names the first such setting, both values and what to do.
    """
    ours, rules = _settings(config, stored.world_size), decisions(config)
    for name, theirs in _settings(stored.config, stored.world_size).items():
        decision = rules[name]
        if decision.rule is OnChange.refused and name in ours and theirs != ours[name]:
            fits = decision.role is not Role.weights
            was, now = shown(theirs), shown(ours[name])
            if isinstance(theirs, list):  # of one entry a layer: as the configs have it
                was, now = (shown(leaves(each)[name]) for each in (stored.config, config))
            raise _refuse(stored, f"{name}={was}", now, decision.note, new_run=fits)


def check_training_data(stored: StoredRun, config: RunConfig) -> None:
    """Refuse other tokens than those that the run has been reading: files, their order, contents and shares.

    Raises:
        CheckpointError: names what differs, both values and what to do.
        DataError: a dataset cannot be read.
    """
    theirs, ours = stored.config.data, config.data
    if stored.record is None:  # an earlier release: paths are all there is
        if theirs.train_prefixes != ours.train_prefixes:
            was, now = (f"data.train={shown(data.train)}" for data in (theirs, ours))
            raise _refuse(stored, was, now, OTHER_ORDER)
        if theirs.train_weights != ours.train_weights and len(ours.train) > 1:
            raise _refuse(stored, f"data.train={shown(theirs.train)}", shown(ours.train), OTHER_ORDER)
        return
    now_there = training_data_of(config)
    if len(now_there) != len(stored.record.training_data):
        was, now = (f"data.train={shown(data.train)}" for data in (theirs, ours))
        raise _refuse(stored, was, now, OTHER_ORDER)
    pairs = zip(
        theirs.train_prefixes, stored.record.training_data, ours.train_prefixes, now_there, strict=True
    )
    for prefix, was_there, our_prefix, is_there in pairs:
        if was_there != is_there:
            raise _refuse(
                stored,
                f"data.train={prefix} of {was_there.describe()}",
                f"{our_prefix} of {is_there.describe()}",
                OTHER_ORDER,
            )
    _check_shares(stored, config, now_there)


def _check_shares(stored: StoredRun, config: RunConfig, datasets: list[DatasetFingerprint]) -> None:
    before, now, length = stored.config.data, config.data, config.stage.seq_length
    theirs, ours = before.train_weights, now.train_weights
    if len(datasets) == 1 or theirs == ours:
        return
    tokens = [dataset.tokens for dataset in datasets]
    if blend_shares(theirs, tokens, length) != blend_shares(ours, tokens, length):
        raise _refuse(stored, f"data.train={shown(before.train)}", shown(now.train), OTHER_ORDER)


@dataclass(frozen=True)
class Change:
    """A setting with another value than in the checkpoint."""

    name: str
    """Dotted: ``optimizer.lr``."""
    was: Any
    now: Any
    note: str
    """What to know of it; may be empty."""

    def describe(self) -> str:
        """In words: ``optimizer.lr 0.001 -> 1e-05``."""
        change = f"{self.name} {shown(self.was)} -> {shown(self.now)}"
        return f"{change} ({self.note})" if self.note else change


def changes_since(stored: StoredRun, config: RunConfig, world_size: int) -> list[Change]:
    """Every change that is worth a word, in the order of the settings.

    Args:
        stored: the run as it was, which :func:`check_settings` and :func:`check_training_data` let go on.
        config: the run as it goes on.
        world_size: its ranks.
    """
    theirs, ours = _settings(stored.config, stored.world_size), _settings(config, world_size)
    changes = []
    for name, decision in decisions(config).items():
        is_known = name in theirs and name in ours
        if decision.rule in (OnChange.free, OnChange.refused) or not is_known or theirs[name] == ours[name]:
            continue
        note = "the same tokens" if decision.rule is OnChange.by_tokens else decision.note
        changes.append(Change(name, theirs[name], ours[name], note))
    return changes
