"""Reading: a model reads text with thresholds of its gates, and a threshold is fitted to a loss budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spikingbrain_train.activation_sparsity.gate_records import GateRecords
from spikingbrain_train.activation_sparsity.gated_model import GatedModel
from spikingbrain_train.evaluation.text_windows import cross_entropy_of

_FIRST, _MOST_DOUBLINGS, _PRECISION = 0.01, 12, 0.05
"""The smallest threshold above 0 that a fit tries (ProSparse's own), how often it is doubled at most, and how
far the fitted one may lie below one that is refused, as a share."""


@dataclass(frozen=True)
class Reading:
    """A model that has read all of the text with one threshold."""

    threshold: float
    cross_entropy: float
    """Nats per token."""
    records: GateRecords


@dataclass(frozen=True)
class Fit:
    """The largest threshold found within a budget."""

    threshold: float
    loss_budget: float
    """Nats per token above the model as it is."""
    refused: float | None
    """The smallest threshold that was tried and costs more; None where none did."""


class Readings:
    """Readings of one text; on several ranks all call every method together.

    Args:
        model: any form.
        windows: token ids of each text, of one length; the last of each is predicted only.
    """

    def __init__(self, model: GatedModel, windows: Sequence[Sequence[int]]) -> None:
        self._model, self._windows = model, windows
        self._found: dict[float, Reading] = {}

    def at(self, threshold: float) -> Reading:
        """With that threshold; read once."""
        if threshold not in self._found:
            with self._model.gates(threshold) as records:
                what = f"reading with threshold {threshold:g}"
                cross_entropy = cross_entropy_of(self._model.language_model, self._windows, what)
            self._found[threshold] = Reading(threshold, cross_entropy, self._model.gathered(records))
        return self._found[threshold]

    @property
    def own(self) -> Reading:
        """With the model's own threshold."""
        return self.at(self._model.threshold)

    @property
    def all(self) -> list[Reading]:
        """By threshold."""
        return [self._found[threshold] for threshold in sorted(self._found)]

    def fit(self, loss_budget: float, candidates: Iterable[float] = ()) -> Fit:
        """The largest threshold from the model's own on up to which no tried one costs more than the budget.

        Candidates first, then doubled ones until one is refused, then halves of what lies between.

        Args:
            loss_budget: nats per token above the model as it is.
            candidates: to try; those that were read are.
        """
        own = self.own
        limit = own.cross_entropy + loss_budget
        tried = sorted({*candidates, *self._found})
        kept, refused = own.threshold, None
        for threshold in (each for each in tried if each > kept):
            if self.at(threshold).cross_entropy > limit:
                refused = threshold
                break
            kept = threshold
        for _ in range(_MOST_DOUBLINGS):
            if refused is not None:
                break
            threshold = max(2 * kept, _FIRST)
            if self.at(threshold).cross_entropy > limit:
                refused = threshold
            else:
                kept = threshold
        while refused is not None and refused - kept > _PRECISION * refused:
            middle = float(f"{(kept + refused) / 2:.3g}")  # a number that somebody types
            if middle in (kept, refused):
                break
            if self.at(middle).cross_entropy > limit:
                refused = middle
            else:
                kept = middle
        return Fit(kept, loss_budget, refused)
