"""The order in which swaps are measured, and what is chosen of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from spikingbrain_train.errors import NumericalError
from spikingbrain_train.layer_choice.measurements import Measurement, Measurements
from spikingbrain_train.layer_choice.selection import cheapest, evenly_spaced
from spikingbrain_train.reporting.activity import Activity


class Meter(Protocol):
    """Measures models; see :class:`spikingbrain_train.layer_choice.meter.SwapMeter`."""

    def measure_source(self) -> float:
        """Cross entropy of the dense source."""
        ...

    def hold(self, base: Collection[int], layer: int) -> None:
        """Prepare models that are as ``base`` in front of ``layer``."""
        ...

    def measure(self, swapped: Collection[int]) -> Measurement:
        """A model whose layers ``swapped`` are swapped."""
        ...


@dataclass(frozen=True)
class Choice:
    """What was measured, and what is chosen."""

    source: float
    """Cross entropy of the dense source, in nats."""
    kept: Measurement
    """No layer is swapped."""
    singles: dict[int, Measurement]
    """One layer is swapped, of each candidate."""
    even: Measurement
    """As many layers as are chosen, evenly spaced: the control."""
    chosen: Measurement
    order: list[int]
    """The chosen layers as they were chosen: the cheapest first."""


def rounds_of(num_candidates: int, number: int, *, greedy: bool) -> int:
    """How many models a search measures, the chosen and the control among them."""
    rounds = number if greedy else 1
    return sum(num_candidates - done for done in range(rounds)) + 3


def search(
    meter: Meter,
    known: Measurements,
    candidates: Sequence[int],
    number: int,
    *,
    greedy: bool,
    show: Callable[[str, int | None, str], AbstractContextManager[Activity]],
    writes: bool = True,
) -> Choice:
    """Measure what is not known yet, and choose.

    Args:
        meter: on all ranks.
        known: what was measured before; the same on all ranks. New ones are added.
        candidates: layers that may be swapped.
        number: of layers to swap.
        greedy: choose one layer after the other, and measure the rest again behind each choice.
        show: shows what runs.
        writes: this rank adds to the record on the disk.

    Raises:
        NumericalError: a model gives NaN or infinity.
    """
    source = known.source
    if source is None:
        source = meter.measure_source()
        known.add_source(source, writes=writes)
    with show("measuring swaps", rounds_of(len(candidates), number, greedy=greedy), "models") as progress:

        def measured(swapped: Collection[int], base: Collection[int] = (), layer: int = 0) -> Measurement:
            found = known.of(swapped)
            if found is None:
                meter.hold(base, layer)
                found = meter.measure(swapped)
                _require_numbers(found)
                known.add(found, writes=writes)
            progress.advance()
            return found

        kept = measured(())
        order: list[int] = []
        singles: dict[int, Measurement] = {}
        for _ in range(number if greedy else 1):
            rest = [layer for layer in candidates if layer not in order]
            found = {layer: measured([*order, layer], order, layer) for layer in rest}
            singles = singles or found
            costs = {layer: each.kl_divergence for layer, each in found.items()}
            order += cheapest(costs, 1) if greedy else sorted(cheapest(costs, number), key=costs.__getitem__)
        even, chosen = measured(evenly_spaced(candidates, number)), measured(order)
    return Choice(source, kept, singles, even, chosen, order)


def _require_numbers(found: Measurement) -> None:
    if not math.isfinite(found.kl_divergence + found.cross_entropy):
        layers = ", ".join(map(str, found.swapped)) or "none"
        raise NumericalError(
            f"the model with swapped layers {layers} gives no number for its cross entropy; leave them out "
            "with --keep, or measure with --dtype float32"
        )
