"""A value as it is written on the command line."""

from __future__ import annotations

from enum import Enum
from typing import Any


def shown(value: Any) -> str:
    """A setting's value as text: ``null``, ``true``, ``[gla,swa]``, ``0.0001``."""
    if isinstance(value, Enum):
        return value.name
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(shown(entry) for entry in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{shown(entry)}' for name, entry in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
