"""What a run that goes on may change since its checkpoint, decided for every setting in one table.

Applied before torch is imported and again on loading. A setting that was changed on purpose takes effect,
with a word where it changes what the run computes, or is refused; none is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spikingbrain_train.architecture.model_checks import has_experts
from spikingbrain_train.architecture.same_architecture import ROLES, Role, leaves, settings_in_use, shown
from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.run import Precision, Resume, RunConfig
from spikingbrain_train.config.run_record import (
    DatasetFingerprint,
    RunRecord,
    blend_shares,
    fingerprint,
    read_record,
)
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    RUN_CONFIG_FILE,
    iteration_folder,
    iteration_of,
    newest_iteration,
)


class Rule(Enum):
    """What happens where a setting is not what it was when the checkpoint was written."""

    free = "free"
    """It takes effect; nothing that the run computes depends on it."""
    said = "said"
    """It takes effect, and the run says so."""
    refused = "refused"
    """The run does not start."""
    by_tokens = "by tokens"
    """Refused where it changes which tokens are read next; said where only their path has changed."""


@dataclass(frozen=True)
class Row:
    """The decision about one setting."""

    rule: Rule
    note: str = ""
    """Why it is refused, or what to know of a change that is said."""


_FREE, _SAID, _TOKENS = Row(Rule.free), Row(Rule.said), Row(Rule.by_tokens)
_ONLY_AT_THE_START = Row(Rule.said, "read at the start only")
_OTHER_ORDER = "the data would be read in another order"
_OF_ROLES = {
    Role.weights: Row(Rule.refused, "its weights are those of another architecture"),
    Role.function: Row(Rule.refused, "it would be another model"),
    Role.training: _SAID,
    Role.start: _ONLY_AT_THE_START,
}

TABLE: dict[str, Row] = {
    **{f"model.{name}": _OF_ROLES[role] for name, role in ROLES.items()},
    "parallel.tensor_model_parallel_size": _SAID,
    "parallel.pipeline_model_parallel_size": _SAID,
    "parallel.context_parallel_size": _SAID,
    "parallel.expert_model_parallel_size": _SAID,
    "parallel.expert_tensor_parallel_size": _SAID,
    "parallel.context_parallel.gated_linear_attention": _SAID,
    "parallel.context_parallel.sliding_window_attention": _SAID,
    "parallel.context_parallel.head_padding": _FREE,
    "parallel.sequence_parallel": _SAID,
    "parallel.data_parallel_size": _SAID,
    "parallel.use_distributed_optimizer": Row(Rule.refused, "its optimizer state has another form"),
    "parallel.overlap_grad_reduce": _FREE,
    "parallel.overlap_param_gather": _FREE,
    "parallel.recompute": _FREE,
    "cluster.accelerator": _SAID,
    "cluster.timeout_minutes": _FREE,
    "cluster.peak_tflops": _FREE,
    "cluster.kernels.gated_linear_attention": _SAID,
    "cluster.kernels.softmax_attention": _SAID,
    "cluster.kernels.parallel_linear": _SAID,
    "cluster.kernels.experts": _SAID,
    "data.train": _TOKENS,
    "data.train_weights": _TOKENS,
    "data.valid": _SAID,
    "data.tokenizer": _SAID,
    "data.reset_at_documents": _SAID,
    "data.num_workers": _FREE,
    "optimizer.lr": _SAID,
    "optimizer.min_lr": _SAID,
    "optimizer.new_parameter_lr_mult": _SAID,
    "optimizer.weight_decay": _SAID,
    "optimizer.adam_beta1": _SAID,
    "optimizer.adam_beta2": _SAID,
    "optimizer.adam_eps": _SAID,
    "optimizer.clip_grad": _SAID,
    "optimizer.lr_decay_style": _SAID,
    "optimizer.lr_warmup_iters": _SAID,
    "optimizer.lr_wsd_decay_iters": _SAID,
    "optimizer.lr_wsd_decay_style": _SAID,
    "stage.kind": Row(Rule.refused, "other parameters would be trained"),
    "stage.train_iters": _SAID,
    "stage.seq_length": Row(Rule.refused, _OTHER_ORDER),
    "stage.micro_batch_size": _SAID,
    "stage.global_batch_size": Row(Rule.refused, "its steps would no longer be counted in the same samples"),
    "stage.teacher": _SAID,
    "stage.alignment.calibration_tokens": _ONLY_AT_THE_START,
    "stage.alignment.calibration_ridge": _ONLY_AT_THE_START,
    "stage.distillation.weight": _SAID,
    "stage.distillation.temperature": _SAID,
    "stage.spike_annealing.init_k": _SAID,
    "stage.spike_annealing.anneal_iters": _SAID,
    "checkpoint.load": Row(Rule.said, "its weights are read at the start only"),
    "checkpoint.resume": _FREE,
    "checkpoint.save_interval": _FREE,
    "checkpoint.keep_last": _FREE,
    "logging.log_interval": _FREE,
    "logging.eval_interval": _FREE,
    "logging.eval_iters": _SAID,
    "logging.tensorboard": _FREE,
    "logging.wandb": _FREE,
    "logging.wandb_project": _FREE,
    "logging.wandb_name": _FREE,
    "output_dir": _FREE,
    "precision": Row(Rule.refused, "weights and optimizer state have another number format"),
    "seed": Row(Rule.refused, _OTHER_ORDER),
    "dry_run": _FREE,
    "dry_run_rank": _FREE,
}
"""Every setting of a run by its dotted name."""


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
    newest = None if config.checkpoint.resume is Resume.never else newest_iteration(checkpoints)
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


def nothing_left_of(config: RunConfig) -> str | None:
    """The sentence for a run that would go on and has no step left, else None. Raises CheckpointError."""
    stored = run_to_resume(config)
    return None if stored is None else nothing_left(config, stored)


def topology(config: RunConfig, world_size: int) -> dict[str, int]:
    """The degrees of parallelism of ``world_size`` ranks, with those that nulls stand for."""
    parallel = config.parallel
    degrees = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
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
    ours = _settings(config, stored.world_size)
    for name, theirs in _settings(stored.config, stored.world_size).items():
        row = TABLE[name]
        if row.rule is Rule.refused and name in ours and theirs != ours[name]:
            fits = not name.startswith("model.") or ROLES[name.removeprefix("model.")] is not Role.weights
            was, now = shown(theirs), shown(ours[name])
            if isinstance(theirs, list):  # of one entry a layer: as the configs have it
                was, now = (shown(leaves(each)[name]) for each in (stored.config, config))
            raise _refuse(stored, f"{name}={was}", now, row.note, new_run=fits)


def check_training_data(stored: StoredRun, config: RunConfig) -> None:
    """Refuse other tokens than those that the run has been reading: files, their order, contents and shares.

    Raises:
        CheckpointError: names what differs, both values and what to do.
        DataError: a dataset cannot be read.
    """
    theirs, ours = stored.config.data, config.data
    if stored.record is None:  # an earlier release: paths are all there is
        if theirs.train != ours.train:
            was, now = (f"data.train={shown(data.train)}" for data in (theirs, ours))
            raise _refuse(stored, was, now, _OTHER_ORDER)
        if theirs.train_weights != ours.train_weights and len(ours.train) > 1:
            was = f"data.train_weights={shown(theirs.train_weights)}"
            raise _refuse(stored, was, shown(ours.train_weights), _OTHER_ORDER)
        return
    now_there = [fingerprint(prefix) for prefix in ours.train]
    if len(now_there) != len(stored.record.training_data):
        was, now = (f"data.train={shown(data.train)}" for data in (theirs, ours))
        raise _refuse(stored, was, now, _OTHER_ORDER)
    pairs = zip(theirs.train, stored.record.training_data, ours.train, now_there, strict=True)
    for prefix, was_there, our_prefix, is_there in pairs:
        if was_there != is_there:
            raise _refuse(
                stored,
                f"data.train={prefix} of {was_there.describe()}",
                f"{our_prefix} of {is_there.describe()}",
                _OTHER_ORDER,
            )
    _check_shares(stored, config, now_there)


def _check_shares(stored: StoredRun, config: RunConfig, datasets: list[DatasetFingerprint]) -> None:
    theirs, ours = stored.config.data.train_weights, config.data.train_weights
    length = config.stage.seq_length
    if len(datasets) == 1 or theirs == ours:
        return
    tokens = [dataset.tokens for dataset in datasets]
    if blend_shares(theirs, tokens, length) != blend_shares(ours, tokens, length):
        raise _refuse(stored, f"data.train_weights={shown(theirs)}", shown(ours), _OTHER_ORDER)


def changes_since(stored: StoredRun, config: RunConfig, world_size: int) -> list[str]:
    """Every change that is worth a word, as "optimizer.lr 0.001 -> 1e-05", in the order of the table.

    Args:
        stored: the run as it was, which :func:`check_settings` and :func:`check_training_data` let go on.
        config: the run as it goes on.
        world_size: its ranks.
    """
    theirs, ours = _settings(stored.config, stored.world_size), _settings(config, world_size)
    changes = []
    for name, row in TABLE.items():
        is_known = name in theirs and name in ours
        if row.rule in (Rule.free, Rule.refused) or not is_known or theirs[name] == ours[name]:
            continue
        note = "the same tokens" if row.rule is Rule.by_tokens else row.note
        change = f"{name} {shown(theirs[name])} -> {shown(ours[name])}"
        changes.append(f"{change} ({note})" if note else change)
    return changes
