"""Flags that give several things a text each: ``name=file``."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.config.named_words import named_words
from spikingbrain_train.errors import ConfigurationError


def named_texts(flag: str, words: Sequence[str], what: str) -> dict[str, str]:
    """Name -> file.

    Args:
        flag: for errors.
        words: behind it.
        what: each name is of, e.g. "ability".

    Raises:
        ConfigurationError: fewer than two, a name twice, or a word that is no ``name=file``.
    """
    found = named_words(flag, words, "file", "code.jsonl", f"give each {what} one file, folder or glob")
    if len(found) < 2:
        raise ConfigurationError(
            f"{flag} names one {what}, and only two or more can be told apart; add name=file"
        )
    return found
