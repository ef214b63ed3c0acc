"""A run's own folder of checkpoints: where it goes on from, what it adds there, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from spikingbrain_train.checkpoint.host_copies import HostCopies
from spikingbrain_train.checkpoint.loading import resume, take_back
from spikingbrain_train.checkpoint.memory_checkpoints import MemoryCheckpoints
from spikingbrain_train.checkpoint.retention import prune_checkpoints
from spikingbrain_train.checkpoint.saving import FilesBesideWeights, PendingSave
from spikingbrain_train.checkpoint.sharded_state import RunState
from spikingbrain_train.config.run import OnDamage, Resume, RunConfig
from spikingbrain_train.config.run_record import RunRecord
from spikingbrain_train.errors import CheckpointError, DamagedCheckpointError
from spikingbrain_train.parallel.agreement import on_main_process
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.file_checks import checkpoint_to_resume
from spikingbrain_train.planning.resume import StoredRun
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    iteration_folder,
    iteration_of,
    iterations,
    latest_checkpoint,
    latest_iteration,
    newest_complete_iteration,
    newest_iteration,
    set_aside,
    set_aside_newer,
    set_latest_iteration,
)
from spikingbrain_train.storage.memory_folder import remove_copies


class RunCheckpoints:
    """The checkpoints in a run's output_dir. All ranks call every method together.

    Args:
        config: the run; its precision is settled.
        groups: process groups.
        say: writes a line for the user; called on the main process only.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups, say: Callable[[str], None]) -> None:
        self.config = config
        self.groups = groups
        self.folder = Path(config.output_dir) / CHECKPOINT_FOLDER
        self._say = say
        self._loaded = _loaded_checkpoint(config)
        self._has_source = self._hf_source() is not None
        self._pending: PendingSave | None = None
        self._copies: HostCopies | None = None
        self.memory: MemoryCheckpoints | None = None
        """Copies in memory; None where checkpoint.memory_interval asks for none."""
        if config.checkpoint.memory_interval:
            self.memory = MemoryCheckpoints(config, groups, say)
        else:  # those of an earlier start would be of another life of the run when a later one looks for them
            remove_copies(config.checkpoint.memory_folder, config.output_dir)
        self._newest_on_disk: int | None = None
        self._newest_in_memory: int | None = None

    def are_resumed(self) -> bool:
        """Whether the run goes on from one of them, or from copies in memory.

        Points to the newest again where that word was lost.

        Damaged ones are set aside where checkpoint.on_damage=previous says so.

        Raises:
            SpikingBrainError: what lies there and checkpoint.resume do not go together.
        """
        tracked = self._tracked() if self.memory is not None else None
        on_main_process(self._settle, self.groups)
        # As the main process sees the folder, which other nodes may see later: all have to take the same way.
        found = [(newest_iteration(self.folder), tracked)]
        if self.groups.world_size > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        [(self._newest_on_disk, tracked)] = found
        if self.memory is not None:
            if self.config.checkpoint.resume is Resume.never:
                self.memory.let_go()
            else:
                self._newest_in_memory = self.memory.newest(self._newest_on_disk, tracked)
        is_resumed = self._newest_on_disk is not None or self._newest_in_memory is not None
        if self.config.checkpoint.resume is Resume.must and not is_resumed:
            raise CheckpointError(
                f"output_dir={self.config.output_dir} holds no checkpoint, no copies in memory can be used "
                "and checkpoint.resume=must; correct output_dir, or checkpoint.resume=auto to start from the "
                "beginning"
            )
        return is_resumed

    @property
    def is_from_memory(self) -> bool:
        """Whether the run goes on, or has gone on, from copies in memory."""
        return self._newest_in_memory is not None

    @property
    def newest_on_disk(self) -> int | None:
        """Iteration of the newest checkpoint."""
        return latest_iteration(self.folder)

    def _tracked(self) -> int | None:
        with suppress(CheckpointError):
            return latest_iteration(self.folder)
        return None

    def _settle(self) -> None:
        """Leave a folder whose newest checkpoint, by every sign, is the one to go on from."""
        sound = checkpoint_to_resume(self.config)
        if sound.newest is None:
            return
        for damage in sound.damaged:
            self._set_damaged_aside(damage.checkpoint, damage.reason)
        try:
            tracked = latest_iteration(self.folder)
        except CheckpointError:  # and checkpoint.on_damage lets it be made anew
            tracked = None
        if tracked is None:
            self._say(
                f"{self.folder} has lost its {LATEST_ITERATION_FILE}; going on from iteration "
                f"{sound.newest}, the newest complete one"
            )
        if tracked != sound.newest:
            set_latest_iteration(self.folder, sound.newest)

    def _set_damaged_aside(self, checkpoint: Path, reason: str) -> None:
        kept = f", set aside as {set_aside(checkpoint, 'damaged').name}" if checkpoint.is_dir() else ""
        self._say(f"warning: iteration {iteration_of(checkpoint)} is damaged{kept}: {reason}")

    def resume(self, state: RunState) -> StoredRun:
        """Fill ``state`` from the newest, and set aside those beyond it, which a user has gone back from.

        Returns:
            The run as it was when it wrote that checkpoint.

        Raises:
            DamagedCheckpointError: it is not what was saved and, where checkpoint.on_damage=previous, neither
                is any other.
            CheckpointError: it is of a run that this one cannot go on with.
        """
        if self.memory is not None and self._newest_in_memory is not None:
            try:
                stored = self.memory.resume(state)
            except CheckpointError as error:
                self._newest_in_memory = None
                if self._newest_on_disk is None:
                    raise CheckpointError(f"{error}, and there is no checkpoint; start again") from error
                if self.groups.is_main_process:
                    self._say(f"{error}; going on from the disk")
            else:
                if self.groups.is_main_process:
                    self._say(f"going on from the copies in memory of iteration {state.iteration}")
                return stored
        while True:
            try:
                stored = resume(self.folder, state, self.config, self.groups)
                break
            except DamagedCheckpointError as error:
                self._go_back(error)

        def set_aside_what_is_newer() -> None:
            for folder in set_aside_newer(self.folder, state.iteration):
                self._say(f"set aside a checkpoint newer than iteration {state.iteration}: {folder}")

        on_main_process(set_aside_what_is_newer, self.groups)
        return stored

    def _go_back(self, error: DamagedCheckpointError) -> None:
        """Have the newest take the place of the one that ``error`` is about, or raise it."""
        damaged = latest_checkpoint(self.folder, "output_dir")
        is_last = newest_complete_iteration(self.folder, below=iteration_of(damaged)) is None
        if self.config.checkpoint.on_damage is OnDamage.stop or is_last:
            raise error

        def go_back() -> None:
            self._set_damaged_aside(damaged, str(error))
            older = newest_complete_iteration(self.folder, below=iteration_of(damaged))
            assert older is not None
            set_latest_iteration(self.folder, older)
            self._settle()

        torch.distributed.barrier()  # all have looked before anything is renamed
        on_main_process(go_back, self.groups)

    def roll_back(self, state: RunState, newest: int) -> int | None:
        """Give ``state`` the weights and the optimizer state of an older iteration; all else of it stays.

        Called while none is pending.

        Args:
            state: of the run that goes on.
            newest: the newest iteration that is good enough.

        Returns:
            The iteration of the newest complete one up to there; None where there is none.

        Raises:
            DamagedCheckpointError: it is not what was saved and, where checkpoint.on_damage=previous, neither
                is any before it.
        """
        assert self._pending is None, f"iteration {self.pending} is still being written"
        state.gather_updated_weights()
        damage: DamagedCheckpointError | None = None
        while (iteration := self._newest_up_to(newest)) is not None:
            checkpoint = iteration_folder(self.folder, iteration)
            try:
                take_back(checkpoint, state, self.config, self.groups)
                return iteration
            except DamagedCheckpointError as error:
                if self.config.checkpoint.on_damage is OnDamage.stop:
                    raise
                damage, newest = error, iteration - 1
                if self.groups.is_main_process:
                    self._say(f"warning: iteration {iteration} is damaged: {error}")
        if damage is not None:  # and state is filled in part
            raise damage
        return None

    def _newest_up_to(self, newest: int) -> int | None:
        """As the main process sees the folder, which other nodes may see later."""
        found = [newest_complete_iteration(self.folder, below=newest + 1)]
        if self.groups.world_size > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    @property
    def pending(self) -> int | None:
        """The iteration that is still on its way to the disk, None where none is."""
        return None if self._pending is None else self._pending.iteration

    def is_working(self) -> bool:
        """Whether this rank is still busy with the pending one; takes part in no collective."""
        return self._pending is not None and self._pending.is_working()

    def begin(self, state: RunState, record: RunRecord) -> None:
        """Start to write one of ``state``, while none is pending.

        With checkpoint.async_save the run may go on; without, :meth:`wait` has to come next.

        Raises:
            CheckpointError: it cannot be written; earlier checkpoints are untouched.
            NumericalError: a number in it is NaN or infinite; nothing is written.
        """
        assert self._pending is None, f"iteration {self.pending} is still being written"
        source = self._hf_source()
        if source is None and self._has_source and self.groups.is_main_process:
            self._say(
                f"iteration {state.iteration} is saved without the tokenizer for its export: no checkpoint "
                f"in {self.folder} or checkpoint.load has a {HF_SOURCE_FOLDER} any more"
            )
        self._has_source = source is not None
        copies = None
        if self.config.checkpoint.async_save:
            copies = self._copies = self._copies or HostCopies(state.model, state.optimizer)
        beside = FilesBesideWeights(self.config, record, source)
        self._pending = PendingSave.begin(self.folder, state, beside, self.groups, copies)

    def advance(self) -> Path | None:
        """Let the pending one go on, once no rank :meth:`is_working`.

        Returns:
            Its folder when it has become the newest and what checkpoint.keep_last and keep_every do not keep
            is removed, None before.

        Raises:
            CheckpointError: it cannot be written; earlier checkpoints are untouched.
        """
        assert self._pending is not None, "no checkpoint is being written"
        pending = self._pending
        try:
            folder = pending.advance()
        except BaseException:
            self._pending = None
            raise
        if folder is not None:
            self._pending = None
            keep = self.config.checkpoint
            prune_checkpoints(self.folder, keep.keep_last, keep.keep_every, self.groups)
        return folder

    def wait(self) -> Path:
        """Wait for the pending one.

        Returns:
            Its folder.

        Raises:
            CheckpointError: it cannot be written; earlier checkpoints are untouched.
        """
        while (folder := self.advance()) is None:
            pass
        return folder

    def _hf_source(self) -> Path | None:
        """The source's configuration and tokenizer, handed from checkpoint to checkpoint for the export.

        From the newest checkpoint that still has them: a user may archive any of them while the run trains.
        """
        own = [iteration_folder(self.folder, iteration) for iteration in reversed(iterations(self.folder))]
        loaded = [] if self._loaded is None else [self._loaded]
        return next((f for each in own + loaded if (f := each / HF_SOURCE_FOLDER).is_dir()), None)


def _loaded_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that a run starts from, None where it has none or, resumed, has it no more."""
    try:
        load = config.checkpoint.load
        return None if load is None else latest_checkpoint(load, "checkpoint.load")
    except CheckpointError:
        return None
