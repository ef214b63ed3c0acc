"""What runs are called in a picture: by what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.recording import Recording

MOST_SETTINGS = 3
"""More settings than that are no name."""

# Where a run lies, what it reports and where it runs: no reason for another curve.
_NO_DIFFERENCE = ("output_dir", "logging.", "cluster.", "checkpoint.", "dry_run", "plugins")


def names_of(recordings: Sequence[Recording], given: Sequence[str] | None = None) -> list[str]:
    """A name for each run, no two the same.

    Args:
        recordings: the runs.
        given: names that the user chose, in the order of the runs.

    Returns:
        The settings in which the runs differ ("lr 0.0001") where those are known and few, else as much of
        their folders as tells them apart.

    Raises:
        ConfigurationError: the names given are not one for each run, or not different.
    """
    if given is not None:
        if len(given) != len(recordings):
            raise ConfigurationError(
                f"--names has {len(given)} names for {len(recordings)} runs; give one for each"
            )
        if len(set(given)) != len(given):
            raise ConfigurationError("--names says the same twice; give names that tell the runs apart")
        return list(given)
    return names_by_settings(recordings) or names_by_folder(recordings)


def names_by_folder(recordings: Sequence[Recording]) -> list[str]:
    """The last part of each folder, with as many folders above it as tell it from the others."""
    paths = [PurePath(each.folder.resolve()).parts for each in recordings]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        lengths = range(1, len(path) + 1)
        length = next((n for n in lengths if all(other[-n:] != path[-n:] for other in others)), len(path))
        names.append("/".join(path[-length:]))
    return names


def names_by_settings(recordings: Sequence[Recording]) -> list[str] | None:
    """The settings in which runs differ, None where they do not, do in too many, or do not say."""
    if len(recordings) < 2 or not all(each.settings for each in recordings):
        return None
    settings = list(dict.fromkeys(name for each in recordings for name in each.settings))
    differing = [
        name
        for name in settings
        if not name.startswith(_NO_DIFFERENCE)
        and any(each.settings.get(name) != recordings[0].settings.get(name) for each in recordings)
    ]
    if not 0 < len(differing) <= MOST_SETTINGS:
        return None
    short = _short_names(differing)
    names = [
        ", ".join(f"{short[name]} {shown(each.settings.get(name))}" for name in differing)
        for each in recordings
    ]
    return names if len(set(names)) == len(names) else None


def shown(value: Any) -> str:
    """A setting's value in few characters."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, float):
        text = f"{value:.3g}"
        mantissa, exponent, power = text.partition("e")
        return f"{mantissa}e{int(power)}" if exponent else _scientific(value) if abs(value) < 0.1 else text
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(each) for each in value) + "]"
    return str(value)


def changes_in_words(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Changes of settings as "lr 0.001 → 0.0001"."""
    short = _short_names(list(changed))
    return [f"{short[name]} {shown(was)} → {shown(now)}" for name, (was, now) in changed.items()]


def _short_names(settings: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name where no other one ends in it."""
    last = [name.rpartition(".")[2] for name in settings]
    return {name: end if last.count(end) == 1 else name for name, end in zip(settings, last, strict=True)}


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"
