"""The files that pictures can be, asked for before anything that draws is imported."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.errors import ConfigurationError

FORMATS = ("png", "svg", "pdf")


def format_of(destination: Path, flag: str = "--output") -> str:
    """The format that a file's suffix names. Raises ConfigurationError, which names the flag."""
    suffix = destination.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        known = ", ".join(f".{each}" for each in FORMATS)
        raise ConfigurationError(
            f"{flag} {destination} ends in none of {known}; give it one of these endings"
        )
    return suffix
