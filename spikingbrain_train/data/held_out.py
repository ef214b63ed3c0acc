"""Held-out data of either kind: text in windows, or examples with loss on their answers."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.data.gpt_dataset import HeldOutSamples, open_valid_dataset
from spikingbrain_train.data.packed_examples import open_valid_examples
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.loss_mask_format import has_loss_mask


def open_held_out(
    prefixes: Sequence[str],
    seq_length: int,
    num_samples: int | None = None,
    vocab_size: int | None = None,
    *,
    reset_at_documents: bool = False,
    alone: bool = False,
) -> HeldOutSamples:
    """Open datasets as a stage of their kind evaluates them: by their loss masks where they have some.

    Args:
        prefixes: at least one.
        seq_length: tokens of a window.
        num_samples: windows to use at most; None for all.
        vocab_size: the model's vocabulary; None skips that check.
        reset_at_documents: keep the documents of a window of text apart; examples always are.
        alone: give every example a window of its own.

    Raises:
        DataError: missing or damaged datasets, or text beside examples, whose losses have no common mean.
    """
    masked = [prefix for prefix in prefixes if has_loss_mask(prefix)]
    if not masked:
        return open_valid_dataset(
            prefixes, seq_length, num_samples, vocab_size, reset_at_documents=reset_at_documents
        )
    if len(masked) < len(prefixes):
        text = next(prefix for prefix in prefixes if prefix not in masked)
        raise DataError(
            f"{masked[0]} holds examples with a loss mask and {text} text: measure them one after the other"
        )
    return open_valid_examples(prefixes, seq_length, num_samples, vocab_size, alone=alone)
