"""What is read: windows of one length, from text as it lies there or from an indexed dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.data.documents import find_sources
from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer


def windows_of_text(
    inputs: Sequence[str], text_key: str, tokenizer: TextTokenizer, windows: int, seq_length: int
) -> list[list[int]]:
    """The first tokens of some documents, one behind the other, an end token between them.

    Args:
        inputs: files, folders or globs, as spikingbrain-preprocess takes them.
        text_key: field of a JSON document.
        tokenizer: of the model.
        windows: to read.
        seq_length: tokens that a window reads.

    Returns:
        ``windows`` lists of seq_length + 1 ids, whose last is predicted only.

    Raises:
        DataError: the inputs cannot be read, or hold too little text.
    """
    wanted = windows * (seq_length + 1)
    tokens: list[int] = []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for source in find_sources(list(inputs)):
        for document in source.read():
            tokens += [*tokenizer.encode(document.text(text_key), special_tokens=False), *end]
            if len(tokens) >= wanted:
                return _cut(tokens, windows, seq_length)
    raise DataError(
        f"--text {' '.join(inputs)} holds {len(tokens)} tokens, and {windows} windows of {seq_length} take "
        f"{wanted}; name more text, or give fewer --windows or a shorter --seq-length"
    )


def windows_of_data(
    prefixes: Sequence[str], tokenizer: Path, vocab_size: int, windows: int, seq_length: int
) -> list[list[int]]:
    """The first windows of indexed datasets, those that spikingbrain-evaluate measures.

    Raises:
        DataError: the datasets are damaged, of another tokenizer, too short, or examples with a loss mask.
    """
    from spikingbrain_train.data.held_out import open_held_out
    from spikingbrain_train.data.indexed import check_same_tokenizer
    from spikingbrain_train.data.tokenizers import load_tokenizer
    from spikingbrain_train.storage.loss_mask_format import has_loss_mask

    masked = [prefix for prefix in prefixes if has_loss_mask(prefix)]
    if masked:
        raise DataError(
            f"--data {masked[0]} holds examples with a loss mask, which have no windows; give text by --text"
        )
    made_with = load_tokenizer(tokenizer)
    for prefix in prefixes:
        check_same_tokenizer(prefix, made_with)
    dataset = open_held_out(prefixes, seq_length, windows, vocab_size)
    if len(dataset) < windows:
        raise DataError(
            f"--data {' '.join(prefixes)} holds {len(dataset)} windows of {seq_length} tokens, not "
            f"{windows}; give fewer --windows or a shorter --seq-length"
        )
    samples = (dataset[index] for index in range(windows))
    return [[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples]


def _cut(tokens: list[int], windows: int, seq_length: int) -> list[list[int]]:
    length = seq_length + 1
    return [tokens[index * length : (index + 1) * length] for index in range(windows)]
