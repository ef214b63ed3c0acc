"""Tables with an entry for every kind of a thing.

A kind that a table does not have is an error, never one of the others: a new one shows at once what it still
has to say about itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

Kind = TypeVar("Kind", bound=Enum)
Entry = TypeVar("Entry")


def of_kind(kind: Kind, table: Mapping[Kind, Entry], what: str) -> Entry:
    """The entry of ``kind``.

    Args:
        kind: a member of an enum.
        table: an entry for each member.
        what: what the entries are, for the error: ``the parameters of a gate``.

    Raises:
        NotImplementedError: the table has none; names the kind and what is missing.
    """
    try:
        return table[kind]
    except KeyError:
        raise NotImplementedError(
            f"{type(kind).__name__} {kind.name} is not known where {what} depend on it; say there what it is"
        ) from None
