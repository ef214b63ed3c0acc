"""What every stage of training has in common: its teacher, its data, and a pass over a global batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.build import build_teacher
from spikingbrain_train.training.console import Console
from spikingbrain_train.training.data_check import ShowActivity
from spikingbrain_train.training.engines.engine import TrainedModel
from spikingbrain_train.training.frozen_base import freeze_base
from spikingbrain_train.training.stages.data import PackedText, StageData
from spikingbrain_train.training.stages.losses import StepLosses

LOSS = Shown("loss", "{:.4f}")


class Stage(ABC):
    """One kind of stage. It says what is trained and fills the gradients; the trainer owns the optimizer.

    Args:
        stage: its settings.
        groups: process groups.
        teacher: the frozen dense source in the same topology; None where the stage learns from none.
    """

    teacher: HybridGPTModel | ModelChunks | None

    def __init__(
        self,
        stage: StageConfig,
        groups: ProcessGroups,
        teacher: HybridGPTModel | ModelChunks | None = None,
    ) -> None:
        self.stage = stage
        self.groups = groups
        self.teacher = teacher

    @property
    def shown(self) -> Mapping[str, Shown]:
        """Those of its losses that the progress line shows, and how."""
        return {"train/loss": LOSS}

    @classmethod
    def build(cls, config: RunConfig, kernels: KernelConfig, groups: ProcessGroups) -> Stage:
        """The stage of a run, with the teacher that it learns from."""
        needs_teacher = kind_of(config.stage).needs_teacher(config.stage)
        return cls(config.stage, groups, build_teacher(config, kernels, groups) if needs_teacher else None)

    @classmethod
    def open_data(cls, config: RunConfig, groups: ProcessGroups, activity: ShowActivity) -> StageData:
        """What it trains on, and what is held out: packed text unless a stage says otherwise.

        Raises:
            DataError, ConfigurationError: on every rank; the data do not fit the run.
        """
        return PackedText(config, groups, activity)

    def freeze(self, model: HybridGPTModel | ModelChunks) -> None:
        """Switch off gradients of what the stage does not train; called before gradient buffers are made.

        Where adapters or some experts train alone, that is everything else.
        """
        freeze_base(model)

    def prepare(
        self,
        model: HybridGPTModel | ModelChunks,
        batches: Iterator[MicroBatch],
        num_microbatches: int,
        console: Console,
    ) -> dict[str, float]:
        """Set in closed form what needs no gradient, on the first batches.

        Called once in the life of a run, before its first step: a run that goes on finds it in its
        checkpoint.

        Args:
            model: this rank's pipeline stage, or its virtual ones (``model.chunks``).
            batches: training batches from the first one on.
            num_microbatches: micro-batches of a global batch on this rank.
            console: for what is going on, and a line about what was done.

        Returns:
            Metrics of the start, the same on every rank; they become a point at iteration 0.
        """
        return {}

    @abstractmethod
    def forward_backward(
        self, model: TrainedModel, batches: Iterator[MicroBatch], num_microbatches: int
    ) -> StepLosses:
        """Accumulate and reduce the gradients of one global batch.

        Args:
            model: this rank's pipeline stage; with virtual stages all of them (``parallel_chunks(model)``).
            batches: this rank's micro-batches.
            num_microbatches: of the global batch.

        Returns:
            Its losses, ``train/loss`` among them, not yet reduced.
        """
