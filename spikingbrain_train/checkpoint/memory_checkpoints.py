"""Copies of a run's state in the memory of its hosts, from which killed processes go on without the disk.

Every rank keeps what it holds itself, in files of a folder in memory (/dev/shm), which outlive the process.
Steps stand still while it is copied there; checksums, and a second copy in the memory of another rank's host,
are made beside them. Two steps are kept: while one is written, the one before is whole on every rank.

At a start all ranks agree on the newest step that is newer than the newest checkpoint on the disk and of
which each rank's state is there and what was kept, on its own host or on another. Where there is none, or the
run has changed, the disk is gone on from.

After "Gemini: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints" (SOSP 2023) and
DLRover's flash checkpoints.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.checkpoint.background import BackgroundWork
from spikingbrain_train.checkpoint.between_hosts import Exchange, FirstError, neighbour_of
from spikingbrain_train.checkpoint.finite_state import first_not_finite_of_run
from spikingbrain_train.checkpoint.memory_shard import (
    PLAIN_FILE,
    TENSOR_FILE,
    check,
    read_tensors,
    seal,
    write_tensors,
)
from spikingbrain_train.checkpoint.rank_state import fill_from_rank, plain_state, read_plain_state, tensors_of
from spikingbrain_train.checkpoint.saving import FilesBesideWeights
from spikingbrain_train.checkpoint.sharded_state import RunState
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import RUN_RECORD_FILE, RunRecord
from spikingbrain_train.errors import CheckpointError, SpikingBrainError, first_line
from spikingbrain_train.parallel.agreement import first_failure, on_main_process
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.planning.memory_copies import keeps_copies
from spikingbrain_train.planning.resume import (
    StoredRun,
    changes_since,
    check_settings,
    check_training_data,
    is_same_topology,
    read_stored_run,
)
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, RUN_CONFIG_FILE
from spikingbrain_train.storage.durable_files import rename_durably
from spikingbrain_train.storage.memory_folder import MemoryFolder, run_id


class MemoryCheckpoints:
    """The copies of one run. All ranks call every method together.

    Args:
        config: the run; its precision is settled.
        groups: process groups.
        say: writes a line for the user; called on the main process only.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups, say: Callable[[str], None]) -> None:
        self._config, self._groups, self._say = config, groups, say
        self._launch = Launch.from_environment()
        # Of hosts with different numbers of ranks the first one's decides who sends to whom.
        known: list[Any] = ["", self._launch.local_world_size]
        on_main_process(lambda: known.__setitem__(0, run_id(config.output_dir)), groups)
        if groups.world_size > 1:
            torch.distributed.broadcast_object_list(known, src=0)
        identity, self._apart = known
        self._folder = MemoryFolder(config.checkpoint.memory_folder, config.output_dir, identity)
        timeout = timedelta(minutes=config.cluster.timeout_minutes)
        self._exchange = Exchange(torch.distributed.new_group(backend="gloo", timeout=timeout))
        self._has_copies = keeps_copies(config, groups.world_size, self._apart)
        self._kept: list[int] = []
        """The last two steps: the older is whole on every rank."""
        self._work: BackgroundWork[None] | None = None
        self._is_off = False
        self._described: tuple[RunRecord, dict[str, bytes]] | None = None
        """Of which record, and the files."""
        if (others := self._folder.remove_others()) and self._launch.local_rank == 0:
            text = f"removed from memory what {len(others)} earlier run(s) in {config.output_dir} left there"
            print(text, flush=True)

    # Keeping

    def keep(self, state: RunState, record: RunRecord, on_disk: int | None) -> bool:
        """Copy a run's state, and make the rest of it beside the steps that follow.

        Args:
            state: of the run.
            record: of the run.
            on_disk: iteration of its newest checkpoint.

        Returns:
            Whether it is kept: where there is no room any more, the run goes on without.
        """
        if self._is_off or not self._is_whole():
            return False
        state.gather_updated_weights()
        rank, iteration = self._groups.rank, state.iteration
        oldest = self._kept[-2] if len(self._kept) > 1 else None  # which nobody needs any more
        reason: str | None = None
        begun: Path | None = None
        try:
            shard = self._folder.shard(rank, iteration)
            begun = self._folder.begin(shard, None if oldest is None else self._folder.shard(rank, oldest))
            write_tensors(begun / TENSOR_FILE, tensors_of(state, self._groups))
            (begun / PLAIN_FILE).write_bytes(plain_state(state, self._groups))
            self._describe(begun, state.model.model_config, record)
            (begun / _ON_DISK).write_text(f"{on_disk or 0}\n")
        except OSError as error:
            reason = first_line(error)
        if not self._agreed(reason):
            return False
        assert begun is not None
        complete = begun
        self._kept = [*self._kept[-1:], iteration]
        self._work = BackgroundWork(
            lambda: self._complete(complete, shard, iteration, oldest), "memory copies"
        )
        return True

    def _describe(self, begun: Path, model: ModelConfig, record: RunRecord) -> None:
        """Write what a checkpoint says of the run; made anew, it would take as long as copying a gigabyte."""
        if self._described is None or self._described[0] != record:
            FilesBesideWeights(self._config, record, None).write(begun, model)
            names = (RUN_CONFIG_FILE, MODEL_CONFIG_FILE, RUN_RECORD_FILE)
            self._described = record, {name: (begun / name).read_bytes() for name in names}
        for name, content in self._described[1].items():
            (begun / name).write_bytes(content)

    def _complete(self, begun: Path, shard: Path, iteration: int, oldest: int | None) -> None:
        if not self._has_copies:
            seal(begun)
        else:
            self._copy_to_neighbour(begun, iteration, oldest)
        _rename(begun, shard)

    def _copy_to_neighbour(self, begun: Path, iteration: int, oldest: int | None) -> None:
        """Seal this rank's shard, send it to the rank that keeps it, too, and receive the one that it keeps.

        Also where this rank fails: others wait for it.
        """
        ranks = self._groups.world_size
        keepers = [neighbour_of(rank, ranks, self._apart) for rank in range(ranks)]
        owner = keepers.index(self._groups.rank)
        copy = self._folder.shard(owner, iteration, is_copy=True)
        older = None if oldest is None else self._folder.shard(owner, oldest, is_copy=True)
        first = FirstError()
        sealed: Path | None = None
        received: Path | None = None
        with first.held_back():
            seal(begun)
            sealed = begun
        with first.held_back():
            received = self._folder.begin(copy, older)
        with first.held_back():
            self._exchange.pass_on(sealed, keepers[self._groups.rank], received, owner)
        first.throw()
        assert received is not None
        check(received)
        _rename(received, copy)

    def _is_whole(self) -> bool:
        """Wait until what was copied last is whole on every rank; False where it cannot become so."""
        if self._work is None:
            return True
        reason: str | None = None
        try:
            self._work.result()
        except (OSError, RuntimeError, SpikingBrainError) as error:
            reason = first_line(error)
        self._work = None
        return self._agreed(reason)

    def _agreed(self, reason: str | None) -> bool:
        failure = first_failure(reason, self._groups)
        if failure is None:
            return True
        self._is_off = True
        self._folder.remove_incomplete()  # no rank writes any more
        if self._groups.is_main_process:
            folder = self._config.checkpoint.memory_folder
            self._say(f"warning: no more copies are kept in memory, {folder} ({failure}); checkpoints are")
        return False

    # Going on

    def newest(self, on_disk: int | None, tracked: int | None) -> int | None:
        """The step that the run can go on from, held to its checksums; its files lie on this host then.

        What is older than the disk is removed.

        Args:
            on_disk: the newest sound checkpoint.
            tracked: what ``latest_checkpointed_iteration.txt`` named: a user who goes back names an older one
                than the copies know of.
        """
        here: dict[tuple[int, int], list[Path]] = {}
        for shard in self._folder.shards():
            here.setdefault((shard.iteration, shard.rank), []).append(shard.folder)
        seen: list[list[tuple[int, int]]] = [[] for _ in range(self._groups.world_size)]
        torch.distributed.all_gather_object(seen, sorted(here))
        ranks = range(self._groups.world_size)
        for iteration in sorted({each for of_rank in seen for each, _ in of_rank}, reverse=True):
            if iteration <= (on_disk or 0):
                break
            holders = [[at for at in ranks if (iteration, owner) in seen[at]] for owner in ranks]
            if not all(holders):
                continue
            if self._all_have(iteration, holders, here) and self._fits(iteration, tracked):
                self._remove_but(iteration)
                self._kept = [iteration]
                return iteration
        self.let_go()
        return None

    def let_go(self) -> None:
        """Remove all copies: what follows is another life of the run, which must not be taken for theirs."""
        torch.distributed.barrier()
        self._folder.remove()  # on every rank: several of a host do no harm
        self._kept = []
        torch.distributed.barrier()

    def _remove_but(self, iteration: int) -> None:
        """Remove from this host other steps, and those of ranks that are on other hosts since the restart."""
        first, ranks = self._launch.rank - self._launch.local_rank, self._groups.world_size
        here = range(first, first + self._launch.local_world_size)
        wanted = {self._folder.shard(rank, iteration) for rank in here}
        if self._has_copies:
            owners = (rank for rank in range(ranks) if neighbour_of(rank, ranks, self._apart) in here)
            wanted |= {self._folder.shard(owner, iteration, is_copy=True) for owner in owners}
        torch.distributed.barrier()
        for shard in self._folder.shards():
            if shard.folder not in wanted:
                shutil.rmtree(shard.folder, ignore_errors=True)
        torch.distributed.barrier()

    def _all_have(
        self, iteration: int, holders: list[list[int]], here: dict[tuple[int, int], list[Path]]
    ) -> bool:
        """Let every rank have a sound shard of its own under its own name, from others where need be."""
        rank = self._groups.rank
        own = self._folder.shard(rank, iteration)
        has = any(self._take(folder, own) for folder in here.get((iteration, rank), []))
        for owner, of_owner in enumerate(holders):
            known = [has]
            torch.distributed.broadcast_object_list(known, src=owner)
            for source in (each for each in of_owner if each != owner and not known[0]):
                if rank == source:
                    sound = next((each for each in here[iteration, owner] if _is_sound(each)), None)
                    self._exchange.send(sound, owner)
                elif rank == owner:
                    has = self._receive(own, source)
                known = [has]
                torch.distributed.broadcast_object_list(known, src=owner)
            if not known[0]:
                if self._groups.is_main_process:
                    self._say(f"the copies in memory of iteration {iteration} are damaged, and not used")
                return False
        return True

    def _take(self, folder: Path, own: Path) -> bool:
        if not _is_sound(folder):
            return False
        if folder != own:
            try:
                shutil.rmtree(own, ignore_errors=True)
                shutil.copytree(folder, own)
            except OSError as error:
                return _cannot_keep(own, error)
        return True

    def _receive(self, own: Path, source: int) -> bool:
        """Receive this rank's shard; False where it is not sound, or cannot be written here."""
        first = FirstError()
        begun: Path | None = None
        with first.held_back():
            begun = self._folder.begin(own, None)
        try:
            is_there = self._exchange.receive(begun, source)
            first.throw()
        except OSError as error:
            return _cannot_keep(own, error)
        if begun is None or not is_there or not _is_sound(begun):
            return False
        _rename(begun, own)
        return True

    def _fits(self, iteration: int, tracked: int | None) -> bool:
        folder = self._folder.shard(self._groups.rank, iteration)
        reason: str | None = None
        try:
            stored = read_stored_run(folder)
            if int((folder / _ON_DISK).read_text()) > (tracked or 0):
                reason = "the run was set back to an older checkpoint"
            elif not is_same_topology(stored, self._config, self._groups.world_size):
                reason = "they are of another topology"
            elif changes := changes_since(stored, self._config, self._groups.world_size):
                reason = f"a setting has changed: {changes[0].describe()}"
            else:
                check_settings(stored, self._config)
                check_training_data(stored, self._config)
        except (SpikingBrainError, OSError, ValueError) as error:
            reason = first_line(error)
        failure = first_failure(reason, self._groups)
        if failure is not None and self._groups.is_main_process:
            self._say(f"the copies in memory of iteration {iteration} are not used: {failure}")
        return failure is None

    def resume(self, state: RunState) -> StoredRun:
        """Fill ``state`` from what :meth:`newest` has found.

        Returns:
            The run as it was when it kept it.

        Raises:
            CheckpointError: on every rank, where it does not fit a rank; ``state`` may be filled in part.
        """
        [iteration] = self._kept
        folder = self._folder.shard(self._groups.rank, iteration)
        reason: str | None = None
        try:
            tensors = read_tensors(folder)
            plain = read_plain_state((folder / PLAIN_FILE).read_bytes())
        except (CheckpointError, OSError) as error:
            reason = first_line(error)
        failure = first_failure(reason, self._groups)  # before the others wait for this rank to fill its own
        if failure is None:
            try:
                fill_from_rank(state, tensors, plain, self._groups)
            except (CheckpointError, OSError) as error:
                reason = first_line(error)
            failure = first_failure(reason, self._groups)
        if failure is None and (
            spoiled := first_not_finite_of_run(state.model, state.optimizer, self._groups)
        ):
            failure = f"they hold NaN or infinity ({spoiled})"
        if failure is not None:
            self.let_go()  # every start would find them again
            raise CheckpointError(f"the copies in memory of iteration {iteration} cannot be used: {failure}")
        return read_stored_run(folder)

    def end(self, *, is_saved: bool) -> None:
        """Let the copies go, once a checkpoint on the disk is as new; a run that fails leaves them."""
        if not is_saved:
            return
        if self._work is not None:
            with suppress(OSError, RuntimeError, SpikingBrainError):  # nobody needs it any more
                self._work.result()
        torch.distributed.barrier()
        self._folder.remove()


_ON_DISK = "newest_on_disk.txt"
"""In a shard: iteration of the newest checkpoint at its time, 0 where there was none."""


def _is_sound(folder: Path) -> bool:
    try:
        check(folder)
    except (CheckpointError, OSError):
        return False
    return True


def _cannot_keep(own: Path, error: OSError) -> bool:
    sys.stderr.write(f"warning: {own} cannot be written ({first_line(error)})\n")
    return False


def _rename(begun: Path, shard: Path) -> None:
    shutil.rmtree(shard, ignore_errors=True)
    rename_durably(begun, shard)
