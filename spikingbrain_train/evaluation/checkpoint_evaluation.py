"""Held-out cross entropy of a Megatron checkpoint: training's own evaluation, without the run around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.data.held_out import open_held_out
from spikingbrain_train.data.indexed import check_same_tokenizer
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.evaluation.checkpoint_model import CheckpointModel
from spikingbrain_train.evaluation.held_out import held_out_cross_entropy
from spikingbrain_train.evaluation.held_out_windows import HeldOutWindows
from spikingbrain_train.evaluation.result import DatasetLoss, Perplexity
from spikingbrain_train.reporting.activity import activity


def measure_checkpoint(
    opened: CheckpointModel,
    prefixes: Sequence[str],
    *,
    seq_length: int,
    max_windows: int | None = None,
    micro_batch_size: int = 1,
    reset_at_documents: bool = False,
    tokenizer: Path | None = None,
) -> Perplexity:
    """Mean cross entropy over every unmasked label of the datasets; the same result on every rank.

    Args:
        opened: the checkpoint on all ranks, which call this together.
        prefixes: held-out datasets.
        seq_length: tokens of a window.
        max_windows: of all windows take the first; None takes all.
        micro_batch_size: windows that a rank processes at a time.
        reset_at_documents: keep the documents of a window apart.
        tokenizer: that the datasets must have been made with; None does not ask.

    Raises:
        DataError: on every rank; datasets that are damaged, empty, of another tokenizer or vocabulary.
    """
    groups, model = opened.groups, opened.request.model
    with activity("opening the data", shown=groups.is_main_process):
        if tokenizer is not None:
            made_with = load_tokenizer(tokenizer)
            for prefix in prefixes:
                check_same_tokenizer(prefix, made_with)
        dataset = open_held_out(
            prefixes, seq_length, max_windows, model.vocab_size, reset_at_documents=reset_at_documents
        )
    held_out = HeldOutWindows(
        dataset,
        prefixes,
        groups,
        micro_batch_size=micro_batch_size,
        num_sink_tokens=model.num_sink_tokens,
    )
    started, shown = time.perf_counter(), groups.is_main_process
    with activity("evaluating", held_out.num_batches, "batches", shown=shown) as progress:
        found = held_out_cross_entropy(
            opened.model,
            progress.over(held_out.batches()),
            held_out.num_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            groups=groups,
            num_datasets=len(prefixes),
        )
    of_datasets = found.by_dataset if len(prefixes) > 1 else [found.mean]
    return Perplexity(
        cross_entropy=found.mean,
        windows=len(dataset),
        seq_length=seq_length,
        tokens=sum(each.tokens for each in held_out.datasets),
        seconds=time.perf_counter() - started,
        datasets=[
            DatasetLoss(each.name, each.prefix, each.tokens, cross_entropy)
            for each, cross_entropy in zip(held_out.datasets, of_datasets, strict=True)
        ],
    )
