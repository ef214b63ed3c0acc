"""A model whose projections can be let read spikes of any k, and be counted. One seam for all forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from spikingbrain_train.evaluation.language_model import LanguageModel
from spikingbrain_train.spike_analysis.linear_records import Records


class SpikingModel(ABC):
    """Behind it is a Hugging Face folder (:mod:`.hugging_face`) or a Megatron checkpoint (:mod:`.megatron`).

    Attributes:
        language_model: that reads text; on several ranks all read together.
        k: with which the model was trained, None where it has no spikes.
        name: for the report.
        num_layers: of the whole decoder.
    """

    language_model: LanguageModel
    k: float | None
    name: str
    num_layers: int

    @abstractmethod
    def spikes(self, k: float) -> AbstractContextManager[Records]:
        """Let the projections read spikes and count them while the context lasts."""

    @abstractmethod
    def no_spikes(self) -> AbstractContextManager[None]:
        """Let them read what they read without spikes, trained with them or not."""

    def gathered(self, records: Records) -> Records:
        """Those of all ranks, on the CPU; every rank calls it."""
        return Records.merged([records.to_cpu()])
