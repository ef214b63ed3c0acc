"""The account of a conversion: every Hugging Face tensor went somewhere or was left out for a reason, once.

Checksums are those of the bytes as Hugging Face files hold them, so that those of an import and of the export
that undoes it can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spikingbrain_train.conversion.safetensors_io import TensorSpec
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.crc32 import combined

CHECKSUMS_FILE = "conversion_checksums.json"
_VERSION = 1


@dataclass(frozen=True)
class Use:
    """What one parameter holds of a Hugging Face tensor, or of some of its rows."""

    tensor: str
    parameter: str
    crc32: int
    """Of these rows as the Hugging Face file holds them."""
    nbytes: int
    first_row: int = 0

    def values(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


@dataclass
class Account:
    """What is to be used, and what is not.

    Args:
        specs: every tensor on the Hugging Face side.
        planned: (tensor, parameter) of every use.
        left_out: tensor -> why.
    """

    specs: Mapping[str, TensorSpec]
    planned: set[tuple[str, str]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def close(self, uses: Iterable[Use]) -> dict[str, Any]:
        """Hold what was done against the plan.

        Args:
            uses: of all parts. A tensor whose copies lie in several parts is read, and noted, for each.

        Returns:
            What ``conversion_checksums.json`` says.

        Raises:
            CheckpointError: a tensor was dropped, invented, used in part or twice, or read as two
                different ones.
        """
        ranges: dict[tuple[str, str], dict[int, Use]] = {}
        for use in uses:
            before = ranges.setdefault((use.tensor, use.parameter), {}).setdefault(use.first_row, use)
            if before != use:
                raise _unbalanced(use.tensor, "was read twice and differed")
        for name, parameter in sorted(self.planned ^ ranges.keys()):
            is_planned = (name, parameter) in self.planned
            raise _unbalanced(name, f"is {'missing from' if is_planned else 'in'} {parameter}")
        checksums: dict[str, int] = {}
        for (name, parameter), by_row in ranges.items():
            crc32, row = 0, 0
            spec = self.specs[name]
            row_bytes = spec.nbytes // max(spec.shape[0], 1) if spec.shape else spec.nbytes
            for first_row, use in sorted(by_row.items()):
                if first_row != row:
                    raise _unbalanced(name, f"has rows in {parameter} that are missing or come twice")
                crc32 = combined(crc32, use.crc32, use.nbytes)
                row += use.nbytes // max(row_bytes, 1)
            if sum(use.nbytes for use in by_row.values()) != spec.nbytes:
                raise _unbalanced(name, f"is in {parameter} in part")
            if checksums.setdefault(name, crc32) != crc32:
                raise _unbalanced(name, "was read twice and differed")
        for name in self.specs:
            if (name in checksums) == (name in self.left_out):
                raise _unbalanced(name, "went nowhere" if name not in checksums else "was left out and used")
        for name in self.left_out:
            if name not in self.specs:
                raise _unbalanced(name, "is none of the source's")
        return self._values(checksums, ranges)

    def _values(self, checksums: Mapping[str, int], ranges: Iterable[tuple[str, str]]) -> dict[str, Any]:
        parameters: dict[str, list[str]] = {}
        for name, parameter in sorted(ranges):
            parameters.setdefault(name, []).append(parameter)
        tensors = {}
        for name in sorted(self.specs):
            spec = self.specs[name]
            entry: dict[str, Any] = {
                "shape": list(spec.shape),
                "dtype": str(spec.dtype).removeprefix("torch."),
            }
            if name in self.left_out:
                entry["left_out"] = self.left_out[name]
            else:
                entry |= {"crc32": f"{checksums[name]:08x}", "parameters": parameters[name]}
            tensors[name] = entry
        return {"version": _VERSION, "tensors": tensors}

    def describe(self) -> str:
        """The account in one line, when it has been closed."""
        used = len(self.specs) - len(self.left_out)
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"all {len(self.specs)} tensors accounted for by checksum: {used} carried over{left}"


def save_checksums(values: Mapping[str, Any], folder: Path) -> None:
    """Write ``conversion_checksums.json`` into ``folder``."""
    (folder / CHECKSUMS_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _unbalanced(tensor: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the account of the conversion does not balance: {tensor} {what}; nothing was written: check the "
        "source's disk, and report this with the command if it happens again"
    )
