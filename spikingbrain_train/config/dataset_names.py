"""Short names of indexed datasets, for metrics and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def dataset_names(prefixes: Sequence[str]) -> list[str]:
    """A name for each prefix, all different: its last part, with as many folders as tell it from the others.

    ``data/wiki/valid`` and ``data/code/valid`` are ``wiki/valid`` and ``code/valid``. A prefix that is listed
    again gets a number: ``valid``, ``valid_2``.
    """
    paths = [PurePath(prefix).parts for prefix in prefixes]
    names: list[str] = []
    for path in paths:
        others = [other for other in paths if other != path]
        lengths = range(1, len(path) + 1)
        short = next((n for n in lengths if all(other[-n:] != path[-n:] for other in others)), len(path))
        name = "/".join(path[-short:]).lstrip("/")
        number, unique = 1, name
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
