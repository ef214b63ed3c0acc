"""Writing a checkpoint from all ranks: begin -> poll -> verify -> commit.

A checkpoint is written under a temporary name. When every rank is done, all of it is on the disk and its
files are what they should be, it is renamed, and only then does ``latest_checkpointed_iteration.txt`` point
to it: after an interrupted save, a failure on any rank or a power loss the previous one is in force. What is
not finite is not saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from spikingbrain_train.checkpoint.failures import failing_together
from spikingbrain_train.checkpoint.finite_state import first_not_finite_of_run
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
    written = "written by all ranks"
    verified = "verified"
    committed = "the newest"
    failed = "removed, because a rank failed"


class PendingSave:
    """A checkpoint on its way to the disk. All ranks call every method together.

    :meth:`begin` starts the writers, and :meth:`poll` says when all ranks are done without waiting for them;
    then :meth:`verify` and :meth:`commit`. Whatever fails on whichever rank, and whenever, is raised on all
    of them (see :func:`~spikingbrain_train.checkpoint.failures.failing_together`) and leaves what was there
    before; after a process was killed, the next save removes what it had begun. One at a time.

    On a GPU the state is copied to the host by :meth:`begin`. On CPU it is not: the run must not go on until
    :meth:`poll` says so.
    """

    def __init__(self, folder: Path, iteration: int, groups: ProcessGroups) -> None:
        self.phase = Phase.writing
        self._folder = folder
        self._iteration = iteration
        self._groups = groups
        self._final = iteration_folder(folder, iteration)
        self._temporary = incomplete_folder(self._final)
        self._writers: ShardWriters | None = None

    @classmethod
    def begin(
        cls, folder: Path, state: RunState, beside: FilesBesideWeights, groups: ProcessGroups
    ) -> PendingSave:
        """Start writing ``<folder>/iter_<iteration>``.

        Args:
            folder: checkpoint folder of the run.
            state: what to write.
            beside: what to write beside it.
            groups: process groups.

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
        with save._failing_together():
            save._writers = ShardWriters(sharded, save._temporary)
        with save._failing_together():
            if groups.is_main_process:
                beside.write(save._temporary, state.model.model_config)
        assert save._writers is not None
        save._writers.start()
        return save

    def poll(self) -> bool:
        """Whether all ranks have written their files; does not wait for those that have not.

        Raises:
            CheckpointError: a rank could not.
        """
        if self._writers is None:
            return True
        working = torch.tensor([not self._writers.is_done()], dtype=torch.int, device=self._groups.device)
        torch.distributed.all_reduce(working, op=torch.distributed.ReduceOp.MAX)
        if working.item():
            return False
        with self._failing_together():
            self._writers.raise_failure()
        with self._failing_together():
            self._writers.finish()
        self._writers = None  # and with it copies of the state
        self.phase = Phase.written
        return True

    def wait(self) -> None:
        """Wait until all ranks have written their files.

        Raises:
            CheckpointError: a rank could not.
        """
        if self._writers is not None:
            self._writers.join()
        is_done = self.poll()
        assert is_done, "a rank polls while others wait"

    def verify(self) -> None:
        """Read back what was written.

        Every rank reads its own files, whose checksums become the manifest; then the main process finds the
        files of all ranks in full.

        Raises:
            CheckpointError: a file cannot be read, is missing, or is not as long as what was written.
        """
        self._expect(Phase.written)
        checksums: dict[str, Parts] = {}
        with self._failing_together():
            checksums = checksums_of_rank(self._temporary)
        is_main, world_size = self._groups.is_main_process, self._groups.world_size
        gathered: list[dict[str, Parts]] | None = [{}] * world_size if is_main else None
        torch.distributed.gather_object(checksums, gathered)
        with self._failing_together():
            if gathered is not None:
                every = {name: parts for of_rank in gathered for name, parts in of_rank.items()}
                write_manifest(self._temporary, every)
                check_written(self._temporary)
        self.phase = Phase.verified

    def commit(self) -> Path:
        """Make it the newest checkpoint of the run; a folder of the same name is set aside.

        A run saves an iteration once. Were the same one the newest already, a process killed between the two
        renames would leave it under its other name only.

        Returns:
            Its folder.

        Raises:
            CheckpointError: the disk fails.
        """
        self._expect(Phase.verified)
        with self._failing_together():
            if self._groups.is_main_process:
                sync_tree(self._temporary)
                if self._final.exists():  # of another life of this run: only who wrote it may remove it
                    set_aside(self._final)
                rename_durably(self._temporary, self._final)
                set_latest_iteration(self._folder, self._iteration)
        self.phase = Phase.committed
        return self._final

    def _expect(self, phase: Phase) -> None:
        assert self.phase is phase, f"the checkpoint is {self.phase.value}, not yet or no more {phase.value}"

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        try:
            with failing_together(self._temporary, self._groups):
                yield
        except BaseException:
            self.phase, self._writers = Phase.failed, None
            raise


def save_checkpoint(folder: Path, state: RunState, beside: FilesBesideWeights, groups: ProcessGroups) -> Path:
    """Write ``<folder>/iter_<iteration>`` from all ranks, make it the newest, and wait for all of that.

    Returns:
        Its folder.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; earlier checkpoints are untouched.
        NumericalError: a weight, a main weight or an optimizer moment is NaN or infinite; nothing is written.
    """
    save = PendingSave.begin(folder, state, beside, groups)
    save.wait()
    save.verify()
    return save.commit()
