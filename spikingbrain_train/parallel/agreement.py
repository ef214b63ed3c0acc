"""Ranks that fail together, with one reason, where something went wrong on some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.run_lock import run_lock

FAILED_ELSEWHERE = ""
"""The reason of a rank that knows only that another one failed."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, told by one that may have heard of it from another."""

    reason: str
    rank: int | None = None
    """Where it happened; None for the rank that tells it."""
    of_storage: bool = False
    """A file could not be read or written."""

    def describe(self) -> str:
        """One line, with the rank if that is known."""
        return self.reason if self.rank is None else f"rank {self.rank}: {self.reason}"


def first_failure(reason: str | None, groups: ProcessGroups) -> str | None:
    """:func:`agreed_failure` of something that has a reason only, in words."""
    failure = agreed_failure(None if reason is None else Failure(reason), groups)
    return None if failure is None else failure.describe()


def agreed_failure(failure: Failure | None, groups: ProcessGroups) -> Failure | None:
    """Why the first rank that knows a reason failed, the same on every rank; None where none failed.

    A collective of all ranks: one number where all went well.

    Args:
        failure: what went wrong on this rank, its reason :data:`FAILED_ELSEWHERE` where only another rank
            knows it, or None where nothing did.
        groups: process groups.

    Returns:
        The failure with its rank, in a world of more than one.
    """
    failed = torch.full((1,), int(failure is not None), dtype=torch.int, device=groups.device)
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if not failed.item():
        return None
    failures: list[Failure | None] = [None] * groups.world_size
    torch.distributed.all_gather_object(failures, failure)
    for teller, said in enumerate(failures):
        if said is not None and said.reason != FAILED_ELSEWHERE:
            rank = teller if said.rank is None else said.rank
            return replace(said, rank=None if groups.world_size == 1 else rank)
    return Failure("another rank failed")


def on_main_process(action: Callable[[], object], groups: ProcessGroups) -> None:
    """Call ``action`` on the main process and wait for it on all others; every rank raises what it raised.

    Args:
        action: writes shared files.
        groups: process groups.

    Raises:
        SpikingBrainError, OSError: from ``action``, on every rank.
    """
    failure: BaseException | None = None
    if groups.is_main_process:
        try:
            action()
        except (SpikingBrainError, OSError) as error:
            failure = error
    failed = torch.full((1,), int(failure is not None), dtype=torch.int, device=groups.device)
    torch.distributed.broadcast(failed, src=0)
    if failed.item():
        failures = [failure]
        torch.distributed.broadcast_object_list(failures, src=0)
        assert failures[0] is not None
        raise failures[0]


@contextmanager
def locked_output_dir(output_dir: str, groups: ProcessGroups) -> Iterator[None]:
    """Hold the lock of a run's folder on the main process while the block runs on all ranks.

    Raises:
        ConfigurationError: on every rank, where another run holds it.
    """
    with ExitStack() as lock:
        on_main_process(lambda: lock.enter_context(run_lock(output_dir)), groups)
        yield
