"""Numerical trouble: which batches are bad, what a run does with them, and when it gives up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import FREE, SAID, setting


class OnBadBatch(str, Enum):
    """What a run does with a batch that is bad."""

    skip = "skip"
    """Leave its update out, write its samples to ``<output_dir>/bad_batches.jsonl``, and go on behind it."""
    stop = "stop"
    """End with exit code 3 before anything is changed."""


@dataclass
class NumericsConfig:
    """What a run does with a bad batch, and whether its sums are the same every time.

    A batch is bad where its loss or its gradient norm is NaN or infinite and, where spikes are looked for,
    where its loss is one. All ranks agree on that before weights change.
    """

    on_bad_batch: OnBadBatch = setting(OnBadBatch.skip, resume=FREE)
    """What happens to it. Skipped, it counts as a step all the same: the schedule and the position in the
    data move on, weights and optimizer state stay."""
    roll_back_after: int | None = setting(3, minimum=1, resume=FREE)
    """Bad batches in a row after which weights and optimizer state of the newest checkpoint from before them
    are taken back, and the run goes on behind them; after as many more without a good one between, those of
    the checkpoint before that. Null never goes back."""
    stop_after: int = setting(10, minimum=1, resume=FREE)
    """Bad batches among the last stop_within steps with which the run ends, with exit code 3."""
    stop_within: int = setting(500, minimum=1, resume=FREE)
    """Steps in which stop_after bad batches are too many."""
    replay: bool = setting(True, resume=FREE)
    """Compute a bad batch once more before anything is changed, and say whether the trouble comes back (the
    data or the weights) or not (the hardware, or nondeterminism)."""
    spike_factor: float | None = setting(None, above=1, resume=SAID)
    """A loss is a spike where it is above so many times the median of the good ones before it, e.g. 2. Null
    does not ask; without spike_margin, no loss is a spike."""
    spike_margin: float | None = setting(None, above=0, resume=SAID)
    """A loss is a spike where it is above that median by more than this; null does not ask. With
    spike_factor, both have to hold."""
    spike_window: int = setting(128, minimum=1, resume=SAID)
    """Good losses that the median is taken over."""
    spike_warmup: int = setting(64, minimum=1, resume=SAID)
    """Good losses that have to be known before one is called a spike; at most spike_window."""

    deterministic: bool = setting(False, resume=SAID)
    """Have equal inputs give equal bits: a resumed run is then that which nobody interrupted, and a replayed
    batch is compared to the last bit. Slower on GPUs, where kernels that cannot do it are not used, or
    refused where they are named."""

    @property
    def looks_for_spikes(self) -> bool:
        """Whether the loss is reduced on every step, for which the host does not wait."""
        return self.spike_factor is not None or self.spike_margin is not None

    def check(self, prefix: str) -> None:
        """What is waited for can come. Raises ConfigurationError."""
        require(
            self.spike_warmup <= self.spike_window,
            f"{prefix}spike_warmup={self.spike_warmup} must be at most {prefix}spike_window="
            f"{self.spike_window}: more losses than those are not kept",
        )
        require(
            self.stop_after <= self.stop_within,
            f"{prefix}stop_after={self.stop_after} must be at most {prefix}stop_within={self.stop_within}, "
            "the steps among which bad batches are counted",
        )
