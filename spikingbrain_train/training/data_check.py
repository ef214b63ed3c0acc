"""All ranks look at the tokens of a dataset together, each at its share, before they train on it.

One rank would let the others wait for as long as a corpus takes to read, which their collectives do not bear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from spikingbrain_train.config.errors import DataError
from spikingbrain_train.data.token_file import TokenFile
from spikingbrain_train.data.token_ids import (
    IdRange,
    fits,
    recall,
    remember,
    require_fit,
    scan,
)
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import Activity


def check_tokens_together(
    prefixes: Iterable[str],
    vocab_size: int,
    groups: ProcessGroups,
    folder: Path,
    activity: Callable[[str, int, str], AbstractContextManager[Activity]],
) -> None:
    """Every token of the datasets is at least 0 and below ``vocab_size``. A collective of all ranks.

    What was found is remembered beside each file or in the run's ``folder``, so a file is read once.

    Args:
        prefixes: the datasets, the same on every rank.
        vocab_size: ids that the model has embeddings for, without rows of padding.
        groups: process groups.
        folder: the run's own folder.
        activity: shows that this runs, and how far it is, on the main process.

    Raises:
        DataError: on every rank; names file, document and token of the first that is not of the vocabulary.
    """
    for prefix in dict.fromkeys(prefixes):
        _check(prefix, vocab_size, groups, folder, activity)


def _check(
    prefix: str,
    vocab_size: int,
    groups: ProcessGroups,
    folder: Path,
    activity: Callable[[str, int, str], AbstractContextManager[Activity]],
) -> None:
    dataset: TokenFile | None = None
    ids: IdRange | None = None
    failure: DataError | None = None
    try:
        dataset = TokenFile(prefix)
        ids = recall(dataset, folder)
    except DataError as error:
        failure = error
    is_done = ids is not None and fits(ids, vocab_size)
    opened, all_done = _least([failure is None, is_done], groups)
    _require(bool(opened), prefix, failure)
    assert dataset is not None
    if all_done and ids is not None:
        remember(dataset, ids, write=False)
        return

    first, end = (dataset.num_tokens * rank // groups.world_size for rank in (groups.rank, groups.rank + 1))
    share = IdRange(0, 0)
    try:
        size = (end - first) * dataset.dtype.itemsize
        with activity(f"checking the tokens of {prefix}, once for this file,", size, "B") as done:
            share = scan(dataset, vocab_size, first, end, done.advance)
    except DataError as error:
        failure = error
    beyond = dataset.num_tokens
    outside = beyond if share.first_outside is None else share.first_outside
    read, smallest, largest, outside = _least(
        [failure is None, share.smallest, -share.largest, outside], groups
    )
    _require(bool(read), prefix, failure)
    found = IdRange(smallest, -largest, None if outside == beyond else outside)
    remember(dataset, found, folder, write=groups.is_main_process)
    require_fit(dataset, found, vocab_size)


def _least(numbers: list[int], groups: ProcessGroups) -> list[int]:
    """The smallest of each number over all ranks."""
    tensor = torch.tensor([int(number) for number in numbers], dtype=torch.int64, device=groups.device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
    return tensor.tolist()


def _require(everywhere: bool, prefix: str, failure: DataError | None) -> None:
    if not everywhere:
        raise failure or DataError(f"another rank cannot read the dataset {prefix}; see what it says")
