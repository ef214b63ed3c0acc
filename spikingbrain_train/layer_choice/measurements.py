"""What was measured, a line of JSON each as it comes: a rerun goes on where the last one stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.durable_files import write_text_durably

MEASUREMENTS_FILE = "measurements.jsonl"


@dataclass(frozen=True)
class Measurement:
    """A model of which some layers are swapped, on the held-out text."""

    swapped: tuple[int, ...]
    """0-based layers, in order."""
    kl_divergence: float
    """KL(source || model) of the next token, mean over tokens, in nats."""
    cross_entropy: float
    """Mean over tokens, in nats."""


class Measurements:
    """Those of one folder.

    Args:
        folder: of them; made with the first.
        settings: what all of them were measured with.

    Raises:
        ConfigurationError: the folder holds measurements of other settings, or a file that is none of ours.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / MEASUREMENTS_FILE
        self.settings = json.loads(json.dumps(settings))
        self.source: float | None = None
        """Cross entropy of the dense source."""
        self._known: dict[tuple[int, ...], Measurement] = {}
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, swapped: Iterable[int]) -> Measurement | None:
        """What is known of a model, None where it has not been measured."""
        return self._known.get(tuple(sorted(swapped)))

    def add(self, measurement: Measurement, *, writes: bool = True) -> None:
        """Keep one; on the disk too, on the rank that writes."""
        self._known[measurement.swapped] = measurement
        if writes:
            self._append(asdict(measurement))

    def add_source(self, cross_entropy: float, *, writes: bool = True) -> None:
        """Keep the dense source's cross entropy, likewise."""
        self.source = cross_entropy
        if writes:
            self._append({"source": cross_entropy})

    def begin(self) -> None:
        """Say on the disk what everything in the folder is made with, if that is not said yet."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_durably(self.path, json.dumps({"settings": self.settings}) + "\n")

    def _append(self, line: Mapping[str, Any]) -> None:
        self.begin()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            settings = first["settings"]
            for line in lines:
                if "source" in line:
                    self.source = float(line["source"])
                else:
                    line["swapped"] = tuple(map(int, line["swapped"]))
                    self._known[line["swapped"]] = Measurement(**line)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self.path} is no record of measurements ({error}); remove it, or name another --output"
            ) from error
        names = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if names:
            raise ConfigurationError(
                f"{self.path} was measured with another {', '.join(names).replace('_', ' ')}; name another "
                "--output, or add --overwrite to begin anew"
            )
        if torn:  # a line that a stopped process left unfinished
            write_text_durably(self.path, whole + "\n")
