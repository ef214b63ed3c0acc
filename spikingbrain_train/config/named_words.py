"""Words of a flag that each give a name something: ``name=file``."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.errors import ConfigurationError


def named_words(flag: str, words: Sequence[str], of: str, example: str, once: str) -> dict[str, str]:
    """Name -> what is behind it.

    Args:
        flag: for errors.
        words: behind it.
        of: what each names, e.g. "file".
        example: of that, of a brick called code.
        once: what to do where a name comes twice.

    Raises:
        ConfigurationError: a name twice, or a word that is no ``name=something``.
    """
    found: dict[str, str] = {}
    for word in words:
        name, between, value = word.partition("=")
        if not (name and between and value):
            raise ConfigurationError(f"{flag} has {word!r}; write each as name={of}, e.g. code={example}")
        if name in found:
            raise ConfigurationError(f"{flag} names {name} twice; {once}")
        found[name] = value
    return found
