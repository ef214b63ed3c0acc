"""Codings: how a whole number of spikes is spread over time steps (SpikingBrain, arXiv 2509.05276, fig. 4).

A rate coding sends one spike a step, as many as the count says (eq. 22): short for small counts, T = the
largest count. A bitwise coding sends the bits of the count (eq. 23), the least significant first: step t is
worth 2^t, and T is the number of bits.

| coding | spikes | counts of T steps |
|---|---|---|
| binary | 0, 1 | 0 .. T |
| ternary | -1, 0, 1 | -T .. T |
| bitwise_unsigned | 0, 1 | 0 .. 2^T - 1 |
| bitwise_bidirectional | -1, 0, 1: every bit carries the sign | -(2^T - 1) .. 2^T - 1 |
| bitwise_twos_complement | 0, 1: the last step is worth -2^(T-1) | -2^(T-1) .. 2^(T-1) - 1 |
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.spiking.spike_train import SpikeTrain

MAX_BITS = 62
"""Of a bitwise coding, so that counts and the worth of every step fit int64."""


class Coding(ABC):
    """How counts become spikes and back.

    Attributes:
        name: of the coding.
        has_negative: whether it holds counts below 0.
    """

    name: str
    has_negative: bool

    def encode(self, counts: Tensor, steps: int | None = None) -> SpikeTrain:
        """Spread counts over time.

        Args:
            counts: [...], whole numbers of any integer or floating dtype.
            steps: of the train; None takes the fewest that hold all counts, at least one.

        Returns:
            A train of [steps, ...] spikes, a byte each.

        Raises:
            ConfigurationError: counts that are not whole, or that the coding does not hold in so many steps.
        """
        whole = _whole(counts)
        low, high = (int(whole.min()), int(whole.max())) if whole.numel() else (0, 0)
        needed = self.steps_for(low, high)
        if steps is None:
            steps = needed
        elif steps < needed:
            least, most = self.holds(steps) if steps > 0 else (0, 0)
            outside = low if low < least else high
            raise ConfigurationError(
                f"the count {outside} does not fit {self.name} of {steps} steps, which holds {least} to "
                f"{most}; give steps={needed}"
            )
        spikes = torch.empty(steps, *whole.shape, dtype=torch.int8, device=whole.device)
        for step in range(steps):
            spikes[step] = self._spikes_at(whole, step)
        return SpikeTrain(spikes, self.step_weights(steps))

    def steps_for(self, low: int, high: int) -> int:
        """The fewest steps, at least one, that hold every count from ``low`` to ``high``.

        Raises:
            ConfigurationError: no number of steps does.
        """
        if low < 0 and not self.has_negative:
            signed = [name for name, each in CODINGS.items() if each.has_negative]
            raise ConfigurationError(
                f"the count {low} is negative, and {self.name} holds counts from 0 on; take "
                f"{', '.join(signed[:-1])} or {signed[-1]}"
            )
        return max(1, self._steps_for(low, high))

    @abstractmethod
    def holds(self, steps: int) -> tuple[int, int]:
        """The least and the largest count that so many steps hold."""

    @abstractmethod
    def step_weights(self, steps: int) -> tuple[int, ...]:
        """What a spike of each step is worth."""

    @abstractmethod
    def spikes_in(self, counts: Tensor, steps: int) -> Tensor:
        """How many spikes each count sends in its first steps.

        A count that needs more steps goes on sending behind them, and one of a sign that the coding does not
        hold sends nothing.

        Args:
            counts: [...] int64, any.
            steps: of the window.

        Returns:
            [...] int64.
        """

    @abstractmethod
    def _steps_for(self, low: int, high: int) -> int: ...

    @abstractmethod
    def _spikes_at(self, counts: Tensor, step: int) -> Tensor: ...


class Binary(Coding):
    """A spike a step until the count is sent."""

    name = "binary"
    has_negative = False

    def holds(self, steps: int) -> tuple[int, int]:
        return 0, steps

    def step_weights(self, steps: int) -> tuple[int, ...]:
        return (1,) * steps

    def spikes_in(self, counts: Tensor, steps: int) -> Tensor:
        return counts.clamp(0, steps)

    def _steps_for(self, low: int, high: int) -> int:
        return high

    def _spikes_at(self, counts: Tensor, step: int) -> Tensor:
        return (counts > step).to(torch.int8)


class Ternary(Coding):
    """A spike of the count's sign a step until it is sent."""

    name = "ternary"
    has_negative = True

    def holds(self, steps: int) -> tuple[int, int]:
        return -steps, steps

    def step_weights(self, steps: int) -> tuple[int, ...]:
        return (1,) * steps

    def spikes_in(self, counts: Tensor, steps: int) -> Tensor:
        return counts.abs().clamp(max=steps)

    def _steps_for(self, low: int, high: int) -> int:
        return max(abs(low), abs(high))

    def _spikes_at(self, counts: Tensor, step: int) -> Tensor:
        return (counts > step).to(torch.int8) - (counts < -step).to(torch.int8)


class _Bitwise(Coding):
    def step_weights(self, steps: int) -> tuple[int, ...]:
        return tuple(1 << step for step in range(steps))

    def spikes_in(self, counts: Tensor, steps: int) -> Tensor:
        bits = self._bits_of(counts)
        return sum(((bits >> step) & 1 for step in range(steps)), torch.zeros_like(bits))

    def steps_for(self, low: int, high: int) -> int:
        steps = super().steps_for(low, high)
        if steps > MAX_BITS:
            raise ConfigurationError(
                f"counts from {low} to {high} take {steps} steps of {self.name}, which has {MAX_BITS} at "
                f"most; give smaller counts"
            )
        return steps

    @abstractmethod
    def _bits_of(self, counts: Tensor) -> Tensor:
        """The number whose bits are sent."""


class BitwiseUnsigned(_Bitwise):
    """The bits of a count that is not negative."""

    name = "bitwise_unsigned"
    has_negative = False

    def holds(self, steps: int) -> tuple[int, int]:
        return 0, (1 << steps) - 1

    def _steps_for(self, low: int, high: int) -> int:
        return high.bit_length()

    def _spikes_at(self, counts: Tensor, step: int) -> Tensor:
        return ((counts >> step) & 1).to(torch.int8)

    def _bits_of(self, counts: Tensor) -> Tensor:
        return counts.clamp(min=0)


class BitwiseBidirectional(_Bitwise):
    """The bits of the magnitude, each a spike of the count's sign."""

    name = "bitwise_bidirectional"
    has_negative = True

    def holds(self, steps: int) -> tuple[int, int]:
        return 1 - (1 << steps), (1 << steps) - 1

    def _steps_for(self, low: int, high: int) -> int:
        return max(abs(low), abs(high)).bit_length()

    def _spikes_at(self, counts: Tensor, step: int) -> Tensor:
        return (((counts.abs() >> step) & 1) * counts.sign()).to(torch.int8)

    def _bits_of(self, counts: Tensor) -> Tensor:
        return counts.abs()


class BitwiseTwosComplement(_Bitwise):
    """The bits of the two's complement: one step more than the magnitude needs, and no negative spike."""

    name = "bitwise_twos_complement"
    has_negative = True

    def holds(self, steps: int) -> tuple[int, int]:
        return -(1 << (steps - 1)), (1 << (steps - 1)) - 1

    def step_weights(self, steps: int) -> tuple[int, ...]:
        weights = super().step_weights(steps)
        return (*weights[:-1], -weights[-1])

    def _steps_for(self, low: int, high: int) -> int:
        # -2^n takes as many bits as 2^n - 1.
        return 1 + max(max(high, 0).bit_length(), (-low - 1).bit_length() if low < 0 else 0)

    def _spikes_at(self, counts: Tensor, step: int) -> Tensor:
        return ((counts >> step) & 1).to(torch.int8)  # the shift of torch keeps the sign

    def _bits_of(self, counts: Tensor) -> Tensor:
        return counts


CODINGS: dict[str, Coding] = {
    each.name: each
    for each in (Binary(), Ternary(), BitwiseUnsigned(), BitwiseBidirectional(), BitwiseTwosComplement())
}
"""By name, in the paper's order."""


def coding_of(name: str) -> Coding:
    """The coding of that name. Raises ConfigurationError where there is none."""
    if name not in CODINGS:
        raise ConfigurationError(f"there is no coding {name}; take one of {', '.join(CODINGS)}")
    return CODINGS[name]


def _whole(counts: Tensor) -> Tensor:
    if not counts.is_floating_point():
        return counts.to(torch.int64)
    fitting = counts.abs() < 2.0**MAX_BITS  # false for NaN, too
    if not bool((fitting & (counts == counts.round())).all()):
        raise ConfigurationError(
            "counts hold a number that is not whole or beyond 2^62; encode what spike_counts gives"
        )
    return counts.to(torch.int64)
