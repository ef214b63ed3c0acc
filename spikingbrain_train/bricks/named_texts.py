"""Flags that give several things a text each: ``name=file``."""

from __future__ import annotations

from collections.abc import Sequence

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
    found: dict[str, str] = {}
    for word in words:
        name, between, file = word.partition("=")
        if not (name and between and file):
            raise ConfigurationError(f"{flag} has {word!r}; write each as name=file, e.g. code=code.jsonl")
        if name in found:
            raise ConfigurationError(f"{flag} names {name} twice; give each {what} one file, folder or glob")
        found[name] = file
    if len(found) < 2:
        raise ConfigurationError(
            f"{flag} names one {what}, and only two or more can be told apart; add name=file"
        )
    return found
