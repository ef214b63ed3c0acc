"""Typed access to the keys of one config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import CheckpointError

OWN_KEYS = "spikingbrain_train"
"""Key of what config.json says for readers of the file alone: no modelling code reads it."""


class ConfigKeys:
    """Every complaint names the file and the key.

    Args:
        values: the file's contents.
        path: what messages call it.
    """

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def refuse(self, key: str, reason: str) -> CheckpointError:
        """The error for a key whose value ``reason`` speaks of: ``must be true or false``."""
        return CheckpointError(f"{self.path}: {key} = {json.dumps(self.values.get(key))} {reason}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(
                f"{self.path}: {key} is missing; a complete config.json of the model is needed"
            )
        return default

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number; without a default the key must be there. Raises CheckpointError."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(key, f"must be a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float | None = None) -> float:
        """A finite number above 0, or of at least ``minimum``; without a default the key must be there.

        Raises CheckpointError.
        """
        value = self._get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value < math.inf
        if not is_number or not (value > 0 if minimum is None else value >= minimum):
            bound = "above 0" if minimum is None else f"of at least {minimum:g}"
            raise self.refuse(key, f"must be a number {bound}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false. Raises CheckpointError."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def numbers(self, key: str, length: int) -> list[float]:
        """A list of ``length`` finite numbers above 0. Raises CheckpointError."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != length:
            raise self.refuse(key, f"must list {length} numbers")
        return [ConfigKeys({key: entry}, self.path).number(key) for entry in value]

    def layers(self, key: str, default: list[int], num_layers: int) -> list[int]:
        """0-based indices of layers. Raises CheckpointError."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < num_layers for i in value):
            raise self.refuse(key, f"must list 0-based layer indices below num_hidden_layers = {num_layers}")
        return value
