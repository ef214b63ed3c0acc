"""What can be measured of a model while it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import Activity
from spikingbrain_train.reporting.progress import Shown


@dataclass(frozen=True)
class HeldOutDataset:
    """One of the datasets that an evaluation reads."""

    name: str
    """Short, and another one than those of the others."""
    prefix: str
    """Path of its files without .bin and .idx."""
    tokens: int
    """Predicted in one evaluation."""


class HeldOutData(Protocol):
    """Data that the run does not train on."""

    @property
    def datasets(self) -> Sequence[HeldOutDataset]:
        """Where it comes from, as far as it lies in indexed datasets; micro-batches say of which they are."""
        ...

    @property
    def num_batches(self) -> int:
        """Micro-batches of this data-parallel rank, as many as on every other."""
        ...

    def batches(self) -> Iterator[MicroBatch]:
        """All of them from the first on, on this rank's device."""
        ...


@dataclass(frozen=True)
class EvaluatedRun:
    """What an evaluator looks at."""

    model: HybridGPTModel | ModelChunks
    """This rank's pipeline stage, in the topology of training; leave it in the mode it is in."""
    config: RunConfig
    groups: ProcessGroups
    iteration: int
    """Optimizer steps done."""
    held_out: HeldOutData | None
    """None where ``data.valid`` is empty."""
    activity: Callable[[str, int | None, str], AbstractContextManager[Activity]]
    """Shows the user what runs: takes its name, the size of the whole and its unit."""


class Evaluator(ABC):
    """Measures a model between two steps. Another one is a subclass that ``logging.evaluators`` names.

    Attributes:
        shown: those of its metrics that the progress line shows, and how.
    """

    shown: Mapping[str, Shown] = {}

    def applies(self, run: EvaluatedRun) -> bool:
        """Whether there is something to measure."""
        return True

    @abstractmethod
    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        """Measure; all ranks call it together. It must leave weights and random generators as they are.

        Returns:
            ``group/name`` -> number, the same on every rank.
        """
