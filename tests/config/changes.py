"""Configs with single settings replaced."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, TypeVar

from spikingbrain_train.config.run import Precision

Config = TypeVar("Config")


def changed(config: Config, name: str, value: Any) -> Config:
    """A copy of a config with one setting replaced, by its dotted name."""
    section, _, rest = name.partition(".")
    if rest:
        value = changed(getattr(config, section), rest, value)
    return dataclasses.replace(config, **{section: value})  # type: ignore[type-var]


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member not in (value, Precision.auto))
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (int, float)):
        return [other(value[0])]
    if isinstance(value, list):
        return [*value[1:], *value[:1]] if len(value) > 1 else [*value, "other"]
    return 3
