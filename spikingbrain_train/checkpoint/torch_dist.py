"""Shards in megatron-core's ``torch_dist`` format, written and read by all ranks together.

Writing has two ends, between which the ranks are free: :class:`ShardWriters` plans it together, writes this
rank's files without the others, and finishes together. What differs between versions of megatron-core
stands in runtime/megatron_versions.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from spikingbrain_train.checkpoint.verification import check_contents, check_whole_files
from spikingbrain_train.config.run import Verification
from spikingbrain_train.runtime.checkpoint_metadata import (
    COMMON_STATE_FILE,
    check_shards_are_whole,
    read_metadata,
)
from spikingbrain_train.runtime.megatron_versions import COMMON_STATE_IN_FILE, OPTIONS_OF_SAVING


class FailedElsewhere(RuntimeError):
    """A read or write failed on another rank, which knows why."""


class FailedOnRank(RuntimeError):
    """A read or write failed on some rank, which may be another one.

    Args:
        rank: where.
        cause: what was raised there.
    """

    def __init__(self, rank: int, cause: BaseException) -> None:
        self.rank = rank
        self.cause = cause
        self.reason = str(cause).removeprefix("Worker failure: ") or type(cause).__name__
        super().__init__(f"rank {rank}: {self.reason}")


class ShardWriters:
    """The files of one checkpoint that this rank writes.

    Made and finished by all ranks together, one checkpoint at a time; :meth:`write` between takes part in no
    collective. What it runs is megatron-core's, as runtime/shard_writers.py has patched it.

    On a GPU all that is written is copied to the host here. On CPU it is written from where it lies, and
    nothing may change it before :meth:`write` returns, unless it was copied before
    (:class:`~spikingbrain_train.checkpoint.host_copies.HostCopies`).

    Args:
        sharded: sharded tensors, and plain values that are the same on every rank.
        folder: an existing, empty folder.

    Raises:
        FailedOnRank, FailedElsewhere, CheckpointingException, OSError: from torch, megatron-core and the file
            system.
    """

    def __init__(self, sharded: dict[str, Any], folder: Path) -> None:
        from megatron.core import dist_checkpointing

        self._folder = folder
        _forget_results_of_failed_saves()
        with _torch_failures_as_exceptions():
            self._request = dist_checkpointing.save(
                sharded, str(folder), async_sharded_save=True, **OPTIONS_OF_SAVING
            )
        self._arguments = list(self._request.async_fn_args)
        if self._request.async_fn is None:  # this rank has nothing to write
            return
        if self._request.preload_fn is not None:
            self._arguments[1] = self._request.preload_fn()  # instead of the tensors: copies on the host

    def write(self) -> None:
        """Write this rank's files.

        Raises:
            Exception: what ends the writers before they could report it to megatron-core, which raises the
                rest in :meth:`finish`.
        """
        if self._request.async_fn is not None:
            self._request.async_fn(*self._arguments, **self._request.async_fn_kwargs)

    def finish(self) -> None:
        """Write ``.metadata`` and what else belongs to all ranks; a collective, when all of them are done.

        Raises:
            FailedOnRank, FailedElsewhere, OSError: a rank could not write.
        """
        from megatron.core import dist_checkpointing

        with _torch_failures_as_exceptions():
            for finalize in self._request.finalize_fns:
                finalize()
        if not COMMON_STATE_IN_FILE and torch.distributed.get_rank() == 0:
            # 0.16 looks for the plain values in this file and nowhere else
            common = dist_checkpointing.load_common_state_dict(str(self._folder))
            torch.save(common, self._folder / COMMON_STATE_FILE)


def _forget_results_of_failed_saves() -> None:
    """Empty the queue through which megatron-core's writers report, one for the whole process.

    The report of a save that failed on another rank may be left there and be taken for that of the next one.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if (results := filesystem_async._results_queue) is not None:
        with contextlib.suppress(queue.Empty):
            while True:
                results.get_nowait()


def load_shards(
    sharded: dict[str, Any], folder: Path, verification: Verification = Verification.full
) -> dict[str, Any]:
    """Read a ``torch_dist`` checkpoint that any supported version wrote, on all ranks.

    The folder may come from anywhere: what is pickled in it is read with unpicklers that run none of its
    code.

    Args:
        sharded: which shards to read; their tensors are filled in place.
        folder: the folder that holds ``metadata.json``.
        verification: whether what is read is held to its checksums first.

    Returns:
        The loaded tensors under the same keys, and the plain values that were saved.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or refers to anything but checkpoint metadata; or
            a file of shards is missing or shorter than it says, or not what the manifest says was saved.
        FailedOnRank, CheckpointingException, OSError, KeyError, RuntimeError: something else is missing,
            damaged or of another shape.
    """
    from megatron.core import dist_checkpointing

    check_whole_files(folder)
    metadata = read_metadata(folder)  # refuses what megatron-core would unpickle as it is
    check_shards_are_whole(metadata, folder)
    if verification is Verification.full:
        check_contents(metadata, folder, sharded)
    options: dict[str, Any] = {}
    if COMMON_STATE_IN_FILE:
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

        options["common_strategy"] = TorchCommonLoadStrategy()
    with _torch_failures_as_exceptions(), _restricted_unpickling():
        return dist_checkpointing.load(sharded, str(folder), **options)


@contextlib.contextmanager
def _torch_failures_as_exceptions() -> Iterator[None]:
    """torch's CheckpointException is no Exception, only a BaseException, and holds the reasons by rank."""
    try:
        yield
    except CheckpointException as error:
        if not error.failures:  # megatron-core tells the reasons of a failed save to rank 0 alone
            raise FailedElsewhere("another rank failed") from error
        rank, (reason, _) = next(iter(error.failures.items()))
        raise FailedOnRank(rank, reason) from error


@contextlib.contextmanager
def _restricted_unpickling() -> Iterator[None]:
    """Every torch.load unpickles tensors and plain values only, as with ``weights_only=True``.

    torch's checkpoint reader asks for ``weights_only=False`` where ``.metadata`` declares an entry to be an
    object; this variable of torch overrules it.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
