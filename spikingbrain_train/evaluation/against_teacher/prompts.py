"""Prompts from held-out text: windows of it, evenly spread."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.data.indexed import open_indexed_dataset
from spikingbrain_train.errors import DataError


def held_out_prompts(prefixes: Sequence[str], count: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Windows of held-out text that do not overlap, spread evenly over all datasets together.

    Args:
        prefixes: indexed datasets, at least one.
        count: windows; fewer where there are no more.
        tokens: of each.
        vocab_size: of the model.

    Raises:
        DataError: missing or damaged datasets, or none has so many tokens.
    """
    datasets = [open_indexed_dataset(prefix, vocab_size) for prefix in prefixes]
    windows = [
        (dataset, first)
        for dataset in datasets
        for first in range(0, dataset.num_tokens - tokens + 1, tokens)
    ]
    if not windows:
        raise DataError(
            f"{', '.join(map(str, prefixes))} has no {tokens} tokens in a row for a prompt; hold out more "
            "text, or take shorter prompts"
        )
    count = min(count, len(windows))
    chosen = (windows[index * len(windows) // count] for index in range(count))
    return [[int(token) for token in dataset.read(first, tokens)] for dataset, first in chosen]
