"""The median of the last good losses, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RunningMedian:
    """The median of the newest numbers; nothing of it makes the host wait, but :meth:`state_dict`.

    Args:
        size: numbers that it is taken over.
        device: where they are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._numbers = torch.zeros(size, dtype=torch.float64, device=device)
        self._size = size
        self._count = 0

    @property
    def count(self) -> int:
        """Numbers that it is taken over now."""
        return min(self._count, self._size)

    def add(self, number: Tensor) -> None:
        """Take up a number, [], in the place of the oldest one where there are enough."""
        self._numbers[self._count % self._size] = number
        self._count += 1

    def median(self) -> Tensor:
        """[] float64, of an even count the lower of the two in the middle. There is at least one number."""
        return self._numbers[: self.count].median()

    def state_dict(self) -> dict[str, Any]:
        """The numbers, the oldest first."""
        oldest = self._count % self._size if self._count > self._size else 0
        return {"numbers": self._numbers[: self.count].roll(-oldest).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the newest numbers of one that may have been larger."""
        newest = state["numbers"][-self._size :]
        self._numbers[: len(newest)] = newest.to(self._numbers)
        self._count = len(newest)
