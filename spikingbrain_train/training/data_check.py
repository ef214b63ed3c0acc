"""All ranks look at the tokens of a dataset together, each at its share, before they train on it.

One rank would let the others wait for as long as a corpus takes to read, which their collectives do not bear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.data.token_file import TokenFile
from spikingbrain_train.data.token_ids import Reader, check_token_ids
from spikingbrain_train.errors import DataError
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import Activity

ShowActivity = Callable[[str, int, str], AbstractContextManager[Activity]]
"""Takes what runs, the size of the whole and its unit."""


def check_tokens_together(
    prefixes: Iterable[str],
    vocab_size: int,
    groups: ProcessGroups,
    folder: Path,
    activity: ShowActivity,
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
    reader = _Ranks(groups, folder, activity)
    for prefix in dict.fromkeys(prefixes):
        dataset: TokenFile | None = None
        failure: DataError | None = None
        try:
            dataset = TokenFile(prefix)
        except DataError as error:
            failure = error
        reader.require(reader.least([int(failure is None)])[0], prefix, failure)
        assert dataset is not None
        check_token_ids(dataset, vocab_size, reader)


class _Ranks(Reader):
    """All ranks of a run."""

    def __init__(self, groups: ProcessGroups, folder: Path, activity: ShowActivity) -> None:
        self.rank, self.world_size = groups.rank, groups.world_size
        self.folder = folder
        self._device = groups.device
        self._activity = activity

    def least(self, numbers: list[int]) -> list[int]:
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
        return tensor.tolist()

    @contextmanager
    def progress(self, dataset: TokenFile, size: int) -> Iterator[Callable[[int], Any]]:
        what = f"checking the tokens of {dataset.prefix}, once for this file,"
        with self._activity(what, size, "B") as activity:
            yield activity.advance
