"""The files a run names: datasets and checkpoints exist, its folder is writable. Changes nothing on disk."""

from __future__ import annotations

import os
import tempfile
from difflib import get_close_matches
from pathlib import Path

from spikingbrain_train.architecture.same_architecture import check_same_weights
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.run import DataConfig, Resume, RunConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError, DataError
from spikingbrain_train.planning.data_position import samples_of
from spikingbrain_train.planning.example_packing import fitting_examples
from spikingbrain_train.planning.resume import (
    StoredRun,
    check_settings,
    check_training_data,
    run_to_resume,
)
from spikingbrain_train.planning.sound_checkpoint import Soundness, newest_sound
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    iterations,
    latest_checkpoint,
)
from spikingbrain_train.storage.memory_folder import RUN_ID_FILE
from spikingbrain_train.storage.run_lock import check_not_in_use

_PROBE_BYTES = 1 << 16
_MOST_NAMES = 3
"""Datasets that are named where one is missing."""


def check_prefix(setting: str, prefix: str) -> None:
    """Both halves of an indexed dataset exist. Raises DataError."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.is_file():
        raise DataError(
            f"{setting}={prefix} is a file of an indexed dataset; name its prefix {path.with_suffix('')}"
        )
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise DataError(
                f"{setting}={prefix}: there is no {prefix}{suffix}{_datasets_near(path)}; make it with "
                f"spikingbrain-preprocess, or correct the prefix (the path without .bin and .idx)"
            )


def _datasets_near(missing: Path) -> str:
    """What somebody may have meant: datasets in the same folder, those of a similar name first."""
    if not missing.parent.is_dir():
        return f", nor a folder {missing.parent}"
    try:
        found = {path.stem for path in missing.parent.glob("*.idx")}
    except OSError:
        return ""
    names = sorted(name for name in found if (missing.parent / f"{name}.bin").is_file())
    near = get_close_matches(missing.name, names, n=_MOST_NAMES, cutoff=0.4) or names[:_MOST_NAMES]
    if not near:
        return f", nor any other dataset in {missing.parent}"
    others = f" and {len(names) - len(near)} others" if len(names) > len(near) else ""
    return f", but {', '.join(str(missing.parent / name) for name in near)}{others}"


def check_train(data: DataConfig) -> None:
    """data.train names datasets, and their weights make a blend. Raises ConfigurationError."""
    if not data.train:
        raise ConfigurationError(
            "data.train is empty; name the prefixes that spikingbrain-preprocess wrote, "
            "e.g. 'data.train=[data/train]'"
        )
    data.check("data.")


def check_data(data: DataConfig) -> None:
    """Datasets, their weights and the tokenizer. Raises ConfigurationError or DataError."""
    check_train(data)
    for setting, prefixes in (("data.train", data.train_prefixes), ("data.valid", data.valid)):
        for number, prefix in enumerate(prefixes):
            check_prefix(f"{setting}[{number}]", prefix)
    if data.tokenizer is not None and not Path(data.tokenizer).exists():
        raise DataError(
            f"data.tokenizer={data.tokenizer} does not exist; name a Hugging Face tokenizer folder or a "
            f"sentencepiece .model file, or null for the one stored with the checkpoint"
        )


def check_examples(config: RunConfig) -> None:
    """A stage that reads examples has some, with loss in a sequence of its length. Raises DataError."""
    stage = config.stage
    if not kind_of(stage).reads_examples:
        return
    for prefix in (*config.data.train_prefixes, *config.data.valid):
        fitting_examples(prefix, stage.seq_length, stage.sft.long_examples)


def check_output_folder(folder: str | Path, setting: str = "output_dir") -> None:
    """``folder`` is writable, or can be made, on a disk that still takes data.

    Tried with a nameless file in the nearest folder that exists, so nothing is created and ranks do not meet.

    Raises:
        ConfigurationError: naming ``setting``, the folder and the reason.
    """
    wanted = Path(folder)
    nearest = Path(os.path.abspath(wanted))
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigurationError(
            f"{setting}={wanted} cannot be a folder: {nearest} is a file; choose another path"
        )
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ConfigurationError(
            f"{setting}={wanted} cannot be written: {nearest}: {error.strerror or error}; "
            f"choose a folder on a disk with free space where you may write"
        ) from error


def check_loaded_checkpoint(config: RunConfig) -> None:
    """checkpoint.load is whole, and its weights fit the model. Raises CheckpointError."""
    load = config.checkpoint.load
    if load is None:
        return
    stored = read_stored_model(latest_checkpoint(load, "checkpoint.load"))
    check_same_weights(stored, config.model, f"checkpoint.load={load}")


def check_teacher(config: RunConfig) -> None:
    """stage.teacher is whole and can teach this model. Raises CheckpointError or ConfigurationError."""
    stage, model = config.stage, config.model
    kind = kind_of(stage)
    if stage.teacher is None or not kind.needs_teacher(stage):
        return
    teacher = read_stored_model(latest_checkpoint(stage.teacher, "stage.teacher"))
    kind.check_teacher(stage, model, teacher, config.parallel, f"stage.teacher={stage.teacher}")


def check_own_checkpoints(config: RunConfig) -> None:
    """output_dir's own checkpoints agree with checkpoint.resume. Raises a SpikingBrainError."""
    output = Path(config.output_dir) / CHECKPOINT_FOLDER
    for setting, other in (
        ("checkpoint.load", config.checkpoint.load),
        ("stage.teacher", config.stage.teacher),
    ):
        if other is not None and os.path.realpath(other) == os.path.realpath(output):
            raise ConfigurationError(
                f"{setting} is {output}, where this run with output_dir={config.output_dir} would write "
                f"over what it starts from; choose another output_dir"
            )
    checkpoint_to_resume(config)


def checkpoint_to_resume(config: RunConfig) -> Soundness:
    """The iteration that the run goes on from, none where it starts at 0, and newer ones that are damaged.

    Folders decide: a lost ``latest_checkpointed_iteration.txt`` does not make a run start over.

    Raises:
        ConfigurationError: there are checkpoints and checkpoint.resume=never.
        CheckpointError: there are none and checkpoint.resume=must, or what checkpoint.on_damage leaves to go
            on from is damaged. Where hosts may have copies in memory, they are asked before the former is
            said (checkpoint/run_checkpoints.py).
    """
    checkpoints, resume = Path(config.output_dir) / CHECKPOINT_FOLDER, config.checkpoint.resume
    if resume is Resume.never and (found := iterations(checkpoints)):
        raise ConfigurationError(
            f"output_dir={config.output_dir} already holds iteration {found[-1]} and "
            "checkpoint.resume=never; choose another output_dir, or checkpoint.resume=auto to go on from it"
        )
    sound = newest_sound(checkpoints, config.checkpoint.on_damage)
    has_kept = bool(config.checkpoint.memory_interval) and (Path(config.output_dir) / RUN_ID_FILE).is_file()
    if resume is Resume.must and sound.newest is None and not has_kept:
        raise CheckpointError(
            f"output_dir={config.output_dir} holds no checkpoint and checkpoint.resume=must; "
            f"correct output_dir, or checkpoint.resume=auto to start from the beginning"
        )
    return sound


def check_files(config: RunConfig) -> StoredRun | None:
    """Everything on disk that the run names.

    Returns:
        The run that this one goes on with, None where it starts.

    Raises:
        ConfigurationError, DataError, CheckpointError: something is missing, or does not fit.
    """
    if not config.dry_run:
        check_not_in_use(config.output_dir)
    check_own_checkpoints(config)
    stored = run_to_resume(config)
    if stored is None:
        check_loaded_checkpoint(config)
    else:  # whose weights are its own by now
        check_settings(stored, config)
    check_teacher(config)
    check_data(config.data)
    check_examples(config)
    if stored is not None:
        check_training_data(stored, config)
    first = 0 if stored is None else stored.consumed_samples
    kind_of(config.stage).check_files(config, range(first, samples_of(config)))
    check_output_folder(config.output_dir)
    return stored
