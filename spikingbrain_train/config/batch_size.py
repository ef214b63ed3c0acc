"""How many sequences an optimizer step reads where a stage begins with small ones.

The size of a step is a function of the sequences read before it alone, so that a resumed run, and one on
other ranks, goes on in the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import SAID, said, setting

_RESUMED = said("steps behind the last sequence read have the new sizes")


class BatchSizeLR(str, Enum):
    """What small steps do to the learning rate."""

    none = "none"
    """Nothing."""
    sqrt = "sqrt"
    """It is multiplied by the root of their share of stage.global_batch_size, which keeps the noise that they
    add to the weights what it is for whole ones (Falcon-Mamba, arXiv 2410.05355)."""
    linear = "linear"
    """It is multiplied by that share."""


_EXPONENTS = {BatchSizeLR.none: 0.0, BatchSizeLR.sqrt: 0.5, BatchSizeLR.linear: 1.0}


@dataclass
class BatchSizeRampConfig:
    """Small steps first, as Megatron-LM's ramp-up."""

    start: int | None = setting(None, minimum=1, resume=_RESUMED)
    """Sequences of the first step; null has stage.global_batch_size from the first step on."""
    increment: int | None = setting(None, minimum=1, resume=_RESUMED)
    """Sequences that come on top at a time; null stands for stage.batch_size_ramp.start."""
    samples: int = setting(0, minimum=0, resume=_RESUMED)
    """Sequences that are read until steps have stage.global_batch_size; each size has an equal share of
    them."""
    lr: BatchSizeLR = setting(BatchSizeLR.none, resume=SAID)
    """What small steps do to the learning rate."""

    def check(self, prefix: str) -> None:
        """What belongs together is there. Raises ConfigurationError."""
        require(
            self.start is not None or (self.increment is None and self.samples == 0),
            f"{prefix}start=null has no ramp, but {prefix}increment or {prefix}samples is set; set "
            f"{prefix}start, or neither",
        )
        require(
            self.start is None or self.samples > 0,
            f"{prefix}start={self.start} needs {prefix}samples, the sequences that the ramp takes",
        )


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the steps of a stage."""

    first: int
    increment: int
    last: int
    """``stage.global_batch_size``."""
    samples: int
    """Sequences that are read until steps have the last size."""
    lr_exponent: float = 0.0

    @classmethod
    def of(cls, ramp: BatchSizeRampConfig, global_batch_size: int) -> BatchSizes:
        """As settings say it."""
        if ramp.start is None:
            return cls(global_batch_size, 1, global_batch_size, 0)
        increment, exponent = ramp.increment or ramp.start, _EXPONENTS[ramp.lr]
        return cls(ramp.start, increment, global_batch_size, ramp.samples, exponent)

    @property
    def _smaller(self) -> int:
        """How many sizes there are below the last."""
        return (self.last - self.first) // self.increment

    def at(self, samples: int) -> int:
        """Sequences of the step that comes behind ``samples`` read ones."""
        if samples >= self.samples:
            return self.last
        return self.first + self.increment * (samples * self._smaller // self.samples)

    def read_by(self, steps: int, samples: int = 0) -> int:
        """Sequences read when ``steps`` more are done behind ``samples`` read ones."""
        while steps > 0 and samples < self.samples:
            size = self.at(samples)
            # The steps that begin below the end of this size, which is rounded up, are of it.
            end = -(-((size - self.first) // self.increment + 1) * self.samples // self._smaller)
            taken = min(steps, -(-(end - samples) // size))
            steps, samples = steps - taken, samples + taken * size
        return samples + max(steps, 0) * self.last

    def lr_factor(self, samples: int) -> float:
        """What the learning rate of the step behind ``samples`` read ones is multiplied by."""
        return float((self.at(samples) / self.last) ** self.lr_exponent)

    def describe(self) -> str | None:
        """The ramp in a phrase; None where there is none."""
        if self.samples == 0:
            return None
        return f"from {self.first:,} sequences, {self.increment:,} more at a time over {self.samples:,}"
