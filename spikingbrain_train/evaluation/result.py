"""What an evaluation on held-out text gives, whatever computed it. Without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spikingbrain_train.config.run_record import fingerprint


@dataclass(frozen=True)
class DatasetLoss:
    """What was measured on one of the datasets."""

    name: str
    prefix: str
    tokens: int
    """Predicted."""
    cross_entropy: float | None
    """Nats per predicted token; None where none of it was read."""


@dataclass(frozen=True)
class Perplexity:
    """What was measured, and over how much."""

    cross_entropy: float
    """Nats per predicted token."""
    windows: int
    seq_length: int
    tokens: int
    """Predicted tokens: labels that carry loss."""
    seconds: float
    """Wall time, without loading the model."""
    datasets: Sequence[DatasetLoss] = ()
    """Each of the datasets."""

    @property
    def perplexity(self) -> float:
        """exp of the cross entropy; infinite where that has no float."""
        try:
            return math.exp(self.cross_entropy)
        except OverflowError:
            return math.inf

    def as_json(self, **more: Any) -> dict[str, Any]:
        """The result as a file keeps it, its datasets told apart as in the events of ``metrics.jsonl``.

        Args:
            more: what else belongs to it.

        Raises:
            DataError: a dataset cannot be read any more.
        """
        numbers = {name: value for name, value in asdict(self).items() if name != "datasets"}
        held_out = {
            each.name: {
                "tokens": each.tokens,
                "fingerprint": fingerprint(each.prefix).digest,
                "cross_entropy": each.cross_entropy,
            }
            for each in self.datasets
        }
        return {**numbers, "perplexity": self.perplexity, "held_out": held_out, **more}

    def describe(self, model: str) -> str:
        """The result as lines for a terminal.

        Args:
            model: what was measured, in words.
        """
        lines = [
            f"model          {model}",
            f"held-out text  {self.tokens:,} tokens in {self.windows} windows of {self.seq_length}",
        ]
        if len(self.datasets) > 1:
            width = max(len(each.name) for each in self.datasets)
            lines += [f"  {each.name:<{width}}  {_words(each)}" for each in self.datasets]
        lines += [
            f"cross entropy  {self.cross_entropy:.4f} nats per token",
            f"perplexity     {self.perplexity:.3f}",
        ]
        return "\n".join(lines)


def _words(loss: DatasetLoss) -> str:
    if loss.cross_entropy is None:
        return "not read: it lies behind the first --max-windows"
    return f"{loss.cross_entropy:.4f} nats per token of {loss.tokens:,}"
