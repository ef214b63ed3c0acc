"""Writing a checkpoint from all ranks: write -> verify -> commit, beside the training loop if need be.

A checkpoint is written under a temporary name. When every rank is done, all of it is on the disk and its
files are what they should be, it is renamed, and only then does ``latest_checkpointed_iteration.txt`` point
to it: after an interrupted save, a failure on any rank or a power loss the previous one is in force. What is
not finite is not saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.checkpoint.background import BackgroundWork
from spikingbrain_train.checkpoint.failures import failing_together
from spikingbrain_train.checkpoint.finite_state import first_not_finite_of_run
from spikingbrain_train.checkpoint.host_copies import HostCopies
from spikingbrain_train.checkpoint.sharded_state import RunState, state_to_save
from spikingbrain_train.checkpoint.torch_dist import ShardWriters
from spikingbrain_train.checkpoint.verification import check_written, checksums_of_rank
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import RunRecord, write_record
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    MODEL_CONFIG_FILE,
    RUN_CONFIG_FILE,
    incomplete_folder,
    iteration_folder,
    remove_incomplete,
    set_aside,
    set_latest_iteration,
    way_back,
)
from spikingbrain_train.storage.checkpoint_manifest import Parts, write_manifest
from spikingbrain_train.storage.durable_files import rename_durably, sync_tree


@dataclass(frozen=True)
class FilesBesideWeights:
    """What a checkpoint says of the run that wrote it."""

    config: RunConfig
    record: RunRecord
    hf_source: Path | None
    """Folder with the source's configuration and tokenizer, copied along for the export; None where there is
    none."""

    def write(self, folder: Path, model: ModelConfig) -> None:
        """Write them into the folder of a checkpoint."""
        save_config(self.config, folder / RUN_CONFIG_FILE)
        write_record(self.record, folder)
        save_config(model, folder / MODEL_CONFIG_FILE)
        if self.hf_source is not None:
            # Links stay links: no file from elsewhere moves into the checkpoint.
            shutil.copytree(self.hf_source, folder / HF_SOURCE_FOLDER, symlinks=True)


class Phase(Enum):
    """How far a checkpoint is."""

    writing = "being written"
    verifying = "written by all ranks, and being read back"
    committing = "verified, and being given its name"
    committed = "the newest"
    failed = "removed, because a rank failed"


class PendingSave:
    """A checkpoint on its way to the disk. All ranks call every method together, but for :meth:`is_working`.

    :meth:`begin` starts the writers. What takes long is done by each rank for itself, in a thread; once no
    rank :meth:`is_working`, :meth:`advance` lets all go on to the next phase. Whatever fails on whichever
    rank, and whenever, is raised on all of them (see
    :func:`~spikingbrain_train.checkpoint.failures.failing_together`) and leaves what was there before; after
    a process was killed, the next save removes what it had begun. One at a time.

    On a GPU the state is copied to the host by :meth:`begin`, on CPU where ``copies`` are given. Without, the
    run must not change it before the phase is another one than writing.
    """

    def __init__(self, folder: Path, iteration: int, groups: ProcessGroups) -> None:
        self.phase = Phase.writing
        self.iteration = iteration
        self._folder = folder
        self._groups = groups
        self._final = iteration_folder(folder, iteration)
        self._temporary = incomplete_folder(self._final)
        self._writers: ShardWriters | None = None
        self._work: BackgroundWork[Any] | None = None

    @classmethod
    def begin(
        cls,
        folder: Path,
        state: RunState,
        beside: FilesBesideWeights,
        groups: ProcessGroups,
        copies: HostCopies | None = None,
    ) -> PendingSave:
        """Start writing ``<folder>/iter_<iteration>``.

        Args:
            folder: checkpoint folder of the run.
            state: what to write.
            beside: what to write beside it.
            groups: process groups.
            copies: lets the run go on while this is written; None where it waits.

        Raises:
            CheckpointError: the folder cannot be written, or the disk is full.
            NumericalError: a weight, a main weight or an optimizer moment is NaN or infinite; nothing is
                written.
        """
        state.gather_updated_weights()
        if spoiled := first_not_finite_of_run(state.model, state.optimizer, groups):
            raise NumericalError(
                f"iteration {state.iteration} is not saved, because it holds NaN or infinity ({spoiled}); "
                f"{way_back(folder)}."
            )
        save = cls(folder, state.iteration, groups)
        with save._failing_together():
            if groups.is_main_process:
                remove_incomplete(folder)
                save._temporary.mkdir(parents=True)
        with save._failing_together():
            sharded = state_to_save(state, groups)
            if copies is not None:
                copies.take(sharded)
        with save._failing_together():
            save._writers = ShardWriters(sharded, save._temporary)
        with save._failing_together():
            if groups.is_main_process:
                beside.write(save._temporary, state.model.model_config)
        assert save._writers is not None
        save._work = BackgroundWork(save._writers.write)
        return save

    def is_working(self) -> bool:
        """Whether this rank still does its part of the phase; takes part in no collective."""
        return self._work is not None and not self._work.is_done()

    def advance(self) -> Path | None:
        """Go on to the next phase; waits for ranks that are still working.

        Returns:
            Its folder when it is committed, None before.

        Raises:
            CheckpointError: a rank could not write, read back or rename.
        """
        assert self._work is not None, f"the checkpoint is {self.phase.value}"
        {
            Phase.writing: self._end_of_writing,
            Phase.verifying: self._end_of_verifying,
            Phase.committing: self._end_of_committing,
        }[self.phase]()
        return self._final if self.phase is Phase.committed else None

    def wait(self) -> Path:
        """Wait until it is committed.

        Returns:
            Its folder.

        Raises:
            CheckpointError: a rank could not write, read back or rename.
        """
        while (folder := self.advance()) is None:
            pass
        return folder

    def _end_of_writing(self) -> None:
        """All files of all ranks are there; each rank reads its own back."""
        with self._failing_together():
            assert self._work is not None and self._writers is not None
            self._work.result()
        with self._failing_together():
            self._writers.finish()
        self._writers = None  # and with it copies of the state
        self._start(Phase.verifying, lambda: checksums_of_rank(self._temporary))

    def _end_of_verifying(self) -> None:
        """Their checksums become the manifest, and the main process finds the files of all ranks in full."""
        checksums: dict[str, Parts] = {}
        with self._failing_together():
            assert self._work is not None
            checksums = self._work.result()
        is_main, world_size = self._groups.is_main_process, self._groups.world_size
        gathered: list[dict[str, Parts]] | None = [{}] * world_size if is_main else None
        torch.distributed.gather_object(checksums, gathered)
        with self._failing_together():
            if gathered is not None:
                every = {name: parts for of_rank in gathered for name, parts in of_rank.items()}
                write_manifest(self._temporary, every)
                check_written(self._temporary)
        self._start(Phase.committing, self._commit if is_main else lambda: None)

    def _commit(self) -> None:
        """Make it the newest checkpoint of the run; a folder of the same name is set aside.

        A run saves an iteration once. Were the same one the newest already, a process killed between the two
        renames would leave it under its other name only.
        """
        sync_tree(self._temporary)
        if self._final.exists():  # of another life of this run: only who wrote it may remove it
            set_aside(self._final)
        rename_durably(self._temporary, self._final)
        set_latest_iteration(self._folder, self.iteration)

    def _end_of_committing(self) -> None:
        with self._failing_together():
            assert self._work is not None
            self._work.result()
        self._work, self.phase = None, Phase.committed

    def _start(self, phase: Phase, work: Callable[[], Any]) -> None:
        self.phase, self._work = phase, BackgroundWork(work)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        try:
            with failing_together(self._temporary, self._groups):
                yield
        except BaseException:
            self.phase, self._writers, self._work = Phase.failed, None, None
            raise


def save_checkpoint(folder: Path, state: RunState, beside: FilesBesideWeights, groups: ProcessGroups) -> Path:
    """Write ``<folder>/iter_<iteration>`` from all ranks, make it the newest, and wait for all of that.

    Returns:
        Its folder.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; earlier checkpoints are untouched.
        NumericalError: a weight, a main weight or an optimizer moment is NaN or infinite; nothing is written.
    """
    return PendingSave.begin(folder, state, beside, groups).wait()
