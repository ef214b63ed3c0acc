"""The line to reach: the dense source's cross entropy, where it was measured on the same held-out text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.reporting.plots.recording import HeldOutSet, Recording


@dataclass(frozen=True)
class DenseLine:
    """The cross entropy of the dense source."""

    cross_entropy: float
    """Nats per token."""
    held_out: HeldOutSet | None = None
    """What it was measured on, None where nobody said."""
    told_by: str = "--dense-cross-entropy"
    """Where the number is from, for sentences."""

    @classmethod
    def read(cls, text: str) -> DenseLine:
        """A number as it was written, or that in the file which ``spikingbrain-evaluate --output`` wrote.

        Raises:
            ConfigurationError: it is neither.
            DataError: the file holds no cross entropy.
        """
        path = Path(text)
        try:
            return cls(_positive(float(text)))
        except ValueError:
            if not path.is_file():
                raise ConfigurationError(
                    f"--dense-cross-entropy {text} is neither a number of nats per token nor a file that "
                    "spikingbrain-evaluate --output wrote; give one of them"
                ) from None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            value = _positive(float(result["cross_entropy"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} holds no cross entropy; name a file that spikingbrain-evaluate --output wrote"
            ) from error
        return cls(value, HeldOutSet.of(result.get("held_out"), result.get("seq_length")), str(path))

    def reason_against(self, recordings: Sequence[Recording]) -> str | None:
        """Why the line does not belong beside the held-out curves of these runs, None where it does."""
        evaluated = [each for each in recordings if any(name.startswith("valid/") for name in each.metrics)]
        if not evaluated:
            return f"{self.told_by} is left out: none of the runs has a held-out cross entropy beside it"
        if self.held_out is None:
            if differ_in_held_out(evaluated):
                return (
                    f"{self.told_by} is left out: the runs evaluate on different held-out text, and it does "
                    "not say on which it was measured; give the file of spikingbrain-evaluate --output"
                )
            return None
        other = next((each for each in evaluated if each.held_out - {self.held_out}), None)
        if other is None:
            return None
        return (
            f"{self.told_by} is left out: it was measured on other held-out text than that of {other.folder} "
            "(another dataset, another number of tokens of it, or another --seq-length)"
        )


def differ_in_held_out(recordings: Sequence[Recording]) -> bool:
    """Whether two of the runs are known to evaluate on different text."""
    return len({held_out for each in recordings for held_out in each.held_out}) > 1


def _positive(value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(value)
    return value
