"""What is read: windows of one length, from text as it lies there or from an indexed dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.data.documents import find_sources
from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.language_model import LanguageModel, ScoreRequest
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer


def windows_asked_for(arguments: argparse.Namespace, language_model: LanguageModel) -> list[list[int]]:
    """Those that the flags of :mod:`.reading_command_line` name; see the functions below."""
    shape = (arguments.windows, arguments.seq_length)
    if arguments.text is not None:
        return windows_of_text(arguments.text, arguments.text_key, language_model.tokenizer, *shape)
    return windows_of_data(arguments.data, language_model.tokenizer.path, language_model.vocab_size, *shape)


def cross_entropy_of(language_model: LanguageModel, windows: Sequence[Sequence[int]], what: str) -> float:
    """Nats per token of windows; on several ranks all call it together.

    Args:
        language_model: that reads them.
        windows: token ids of each text, of one length; the last of each is predicted only.
        what: is read, for the progress that is shown.
    """
    requests = [ScoreRequest(window[:1], window[1:]) for window in windows]
    scores = language_model.score(requests, what=what)
    return -sum(score.log_prob for score in scores) / sum(len(score.log_probs) for score in scores)


def windows_of_text(
    inputs: Sequence[str],
    text_key: str,
    tokenizer: TextTokenizer,
    windows: int,
    seq_length: int,
    flag: str = "--text",
) -> list[list[int]]:
    """The first tokens of some documents, one behind the other, an end token between them.

    Args:
        inputs: files, folders or globs, as spikingbrain-preprocess takes them.
        text_key: field of a JSON document.
        tokenizer: of the model.
        windows: to read.
        seq_length: tokens that a window reads.
        flag: that names the inputs, for errors.

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
        f"{flag} {' '.join(inputs)} holds {len(tokens)} tokens, and {windows} windows of {seq_length} take "
        f"{wanted}; name more text, or give fewer --windows or a shorter --seq-length"
    )


def windows_of_data(
    prefixes: Sequence[str], tokenizer: Path, vocab_size: int, windows: int, seq_length: int
) -> list[list[int]]:
    """The first full windows of indexed datasets, of those that spikingbrain-evaluate measures.

    What is left at the end of a dataset fills no window, and its padding is no text.

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
    dataset = open_held_out(prefixes, seq_length, vocab_size=vocab_size)
    found: list[list[int]] = []
    for index in range(len(dataset)):
        if len(found) == windows:
            break
        sample = dataset[index]
        if bool((sample["loss_mask"] > 0).all()):
            found.append([*sample["tokens"].tolist(), int(sample["labels"][-1])])
    if len(found) < windows:
        raise DataError(
            f"--data {' '.join(prefixes)} holds {len(found)} windows of {seq_length} tokens, not "
            f"{windows}; give fewer --windows or a shorter --seq-length"
        )
    return found


def _cut(tokens: list[int], windows: int, seq_length: int) -> list[list[int]]:
    length = seq_length + 1
    return [tokens[index * length : (index + 1) * length] for index in range(windows)]
