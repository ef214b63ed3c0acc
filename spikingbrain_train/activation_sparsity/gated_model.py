"""A model whose gates can be given a threshold, and be counted. One seam for all forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from spikingbrain_train.activation_sparsity.gate_records import GateRecords
from spikingbrain_train.evaluation.language_model import LanguageModel


class GatedModel(ABC):
    """Behind it is a Hugging Face folder (:mod:`.hugging_face`) or a Megatron checkpoint (:mod:`.megatron`).

    Attributes:
        language_model: that reads text; on several ranks all read together.
        name: for the report.
        threshold: below which its gates are closed; 0 is ReLU.
    """

    language_model: LanguageModel
    name: str
    threshold: float

    @abstractmethod
    def gates(self, threshold: float) -> AbstractContextManager[GateRecords]:
        """Close gates below a threshold and count what is zero while the context lasts."""

    def gathered(self, records: GateRecords) -> GateRecords:
        """Those of all ranks, on the CPU; every rank calls it."""
        return GateRecords.merged([records])
