"""Tables with an entry for every value of a setting that is an enum.

A value that a table does not have is an error, never one of the others: a new one shows at once where it is
still missing. Kinds of layers, which plugins add to, stand in registries instead (architecture/registry.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

Member = TypeVar("Member", bound=Enum)
Entry = TypeVar("Entry")


def entry_of(member: Member, table: Mapping[Member, Entry], what: str) -> Entry:
    """The entry of ``member``.

    Args:
        member: a value of a setting.
        table: an entry for each member.
        what: what the entries are, for the error: ``the parameters of a gate``.

    Raises:
        NotImplementedError: the table has none; names the value and what is missing.
    """
    try:
        return table[member]
    except KeyError:
        name = f"{type(member).__name__} {member.name}"
        raise NotImplementedError(
            f"{name} is not known where {what} depend on it; say there what it is"
        ) from None
