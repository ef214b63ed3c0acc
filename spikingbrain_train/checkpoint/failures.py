"""Ranks that write a checkpoint fail together, and say whether the storage is at fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException

from spikingbrain_train.checkpoint.torch_dist import FailedElsewhere, FailedOnRank
from spikingbrain_train.errors import CheckpointError, first_line
from spikingbrain_train.parallel.agreement import FAILED_ELSEWHERE, Failure, agreed_failure
from spikingbrain_train.parallel.process_groups import ProcessGroups

_FULL_BYTES = 1 << 20  # below what the smallest file of weights takes


@contextmanager
def failing_together(temporary: Path, groups: ProcessGroups) -> Iterator[None]:
    """Let all ranks fail when one could not write, and clean up; a collective of all ranks.

    They fail with one sentence where the storage is at fault; from anything else the rank that met it goes on
    to raise that itself. No rank writes into the folder any more when the block ends.

    Args:
        temporary: folder of the checkpoint until it is complete, which is removed.
        groups: process groups.

    Raises:
        CheckpointError: on every rank where a rank could not write, and on those that met no error of their
            own.
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


_TOLD = (FailedElsewhere, FailedOnRank)
"""Failures of ranks that may not be this one."""


def _failure(error: Exception, folder: Path) -> Failure:
    """What a rank tells the others of an exception that it met while writing to ``folder``."""
    if isinstance(error, FailedElsewhere):
        return Failure(FAILED_ELSEWHERE)
    rank, reason, of_storage = None, first_line(error), _is_of_storage(error)
    if isinstance(error, FailedOnRank):
        rank, reason = error.rank, error.reason.splitlines()[0]
    if _is_full(folder):  # megatron-core 0.19 does not say so
        reason, of_storage = f"the disk is full, {reason}", True
    return Failure(reason, rank, of_storage)


def _is_of_storage(error: Exception) -> bool:
    if isinstance(error, FailedOnRank):  # while its writers worked
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
