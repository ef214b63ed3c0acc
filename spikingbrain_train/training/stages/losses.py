"""The losses of a step, left where they were computed until somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

NOTHING_COUNTED, FINE, NOT_FINITE = range(3)
"""What :attr:`StepLosses.standing` says of a rank; of several ranks the largest holds."""


class StepLosses:
    """Sums over this rank's part of a global batch, on its device.

    Args:
        sums: [n] float64.
        reduce: from ``sums`` to the metrics of all ranks, as [] tensors by name, the same on every rank;
            ``train/loss`` is among them. A collective of all ranks.
        weight: what the sums are divided by, [] on the same device (tokens); None where that is never 0.
    """

    def __init__(
        self, sums: Tensor, reduce: Callable[[Tensor], dict[str, Tensor]], weight: Tensor | None = None
    ) -> None:
        self._sums = sums
        self._reduce = reduce
        self._weight = weight
        self.grad_norm: float | None = None
        """Of the gradients that came with them, over all ranks that share the model; None until it is known.
        Replicas have the same, unless something is wrong with one of them."""

    @property
    def standing(self) -> Tensor:
        """[] int on the device of the sums: whether this rank adds something, and something finite.

        The mean over all ranks is a number where the largest of them is :data:`FINE`.
        """
        counts = self._sums.new_ones((), dtype=torch.int) if self._weight is None else self._weight > 0
        return torch.where(self._sums.isfinite().all(), counts.int(), NOT_FINITE)

    @property
    def sums(self) -> Tensor:
        """[n] float64 on its device: of this rank alone, whatever has been reduced."""
        return self._sums

    @cached_property
    def on_device(self) -> dict[str, Tensor]:
        """The metrics of all ranks, left where they are: the host does not wait.

        The first look is a collective of all ranks.
        """
        return self._reduce(self._sums.clone())

    def reduced(self) -> dict[str, float]:
        """The metrics of all ranks. The first call is a collective of all of them, and the host waits."""
        return dict(self._reduced)

    @cached_property
    def _reduced(self) -> dict[str, float]:
        metrics = self.on_device
        return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
