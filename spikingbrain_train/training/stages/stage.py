"""What every stage of training has in common: one forward and backward pass over a global batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from megatron.core.distributed import DistributedDataParallel

from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel


class Stage(Protocol):
    """One kind of stage. It says what is trained and fills the gradients; the trainer owns the optimizer."""

    def freeze(self, model: HybridGPTModel) -> None:
        """Switch off gradients of what the stage does not train; called before gradient buffers are made."""

    def prepare(self, model: HybridGPTModel, batches: Iterator[MicroBatch], num_microbatches: int) -> None:
        """Set in closed form what needs no gradient, on the first batches; called once before the first step.

        Args:
            model: this rank's pipeline stage.
            batches: training batches from the first one on.
            num_microbatches: micro-batches of a global batch on this rank.
        """

    def forward_backward(
        self, model: DistributedDataParallel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> dict[str, float]:
        """Accumulate and reduce the gradients of one global batch.

        Returns:
            Metrics, the same on every rank; ``train/loss`` is among them.
        """
