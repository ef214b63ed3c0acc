"""Which documents a training sample is made of, for people who look for what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spikingbrain_train.data.gpt_dataset import TrainDataset
from spikingbrain_train.data.token_file import document_lengths


def origins(dataset: TrainDataset, samples: Sequence[int]) -> list[dict[str, Any]]:
    """Where samples lie in the files of ``data.train``.

    Args:
        dataset: of the run.
        samples: their numbers in the order of the run.

    Returns:
        For each: ``sample``, ``prefix``, and ``tokens`` and ``documents``: for each stretch of it the first
        and the last token of the file, and the documents that these are in; all counted from 0.
    """
    ends: dict[str, np.ndarray] = {}
    found = []
    for sample in samples:
        part, index = dataset.part_of(sample)
        if part.prefix not in ends:
            ends[part.prefix] = np.cumsum(document_lengths(part.prefix)[1], dtype=np.int64)
        tokens = [(first, first + count - 1) for first, count in part.stretches(index)]
        tokens = [(first, min(last, int(ends[part.prefix][-1]) - 1)) for first, last in tokens]
        documents = np.searchsorted(ends[part.prefix], tokens, side="right").tolist()
        found.append(
            {"sample": sample, "prefix": part.prefix, "tokens": tokens, "documents": documents},
        )
    return found
