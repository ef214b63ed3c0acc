"""What a kind of stage says about itself: what it learns from, what trains, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig


class StageKind(ABC):
    """One kind of stage.

    A new one is a file with a subclass of this, another with the class that trains it, and one line in
    :mod:`~spikingbrain_train.planning.stages.registry`.
    """

    name: ClassVar[str]
    """What ``stage.kind`` calls it."""
    trained_by: ClassVar[str]
    """Where its class, a training.stages.stage.Stage, is imported from: ``package.module:Class``."""
    reads_source: ClassVar[bool] = False
    """Whether mixers of the model run on hidden states of the dense source, where sinks are padding."""
    trains_mixers: ClassVar[bool] = False
    """Whether swapped mixers train and nothing else, whatever the model would have trained."""
    reads_examples: ClassVar[bool] = False
    """Whether its data are examples with a loss mask, packed whole and kept apart, and not text."""

    @abstractmethod
    def reason_for_teacher(self, stage: StageConfig) -> str | None:
        """The setting because of which the stage learns from ``stage.teacher``, None where it does not."""

    next_stage: ClassVar[str | None] = None
    """What usually follows, as words of a command line (``stage=cpt``); None where the model is done."""

    def describe(self, config: RunConfig) -> str:
        """What the stage does, for the first line of a run."""
        learns = f", learning from {config.stage.teacher}" if self.needs_teacher(config.stage) else ""
        return f"{self.name}{learns}"

    def needs_teacher(self, stage: StageConfig) -> bool:
        """Whether the stage learns from the dense source."""
        return self.reason_for_teacher(stage) is not None

    def starts_in_closed_form(self, stage: StageConfig) -> bool:
        """Whether it sets weights before its first step, so that it does something without any."""
        return False

    def start_flops(self, config: RunConfig) -> float:
        """FLOPs of what it does before its first step, in all."""
        return 0.0

    def all_settings(self, stage: StageConfig) -> set[str]:
        """Dotted names of settings that are there for it, and for others that name them, too.

        ``stage.teacher`` is one of those that :meth:`reason_for_teacher` names, and need not be among them.
        """
        return set()

    def settings(self, stage: StageConfig) -> set[str]:
        """Those of them that have a part in it, with the values that others have."""
        return self.all_settings(stage)

    @abstractmethod
    def check(self, stage: StageConfig) -> None:
        """Its own settings on their own. Raises ConfigurationError."""

    @abstractmethod
    def check_teacher(
        self,
        stage: StageConfig,
        model: ModelConfig,
        teacher: ModelConfig,
        parallel: ParallelConfig,
        setting: str,
    ) -> None:
        """Whether ``teacher`` can teach ``model``; called where the stage needs one.

        Args:
            stage: the stage of the run.
            model: the network that trains.
            teacher: the network of ``stage.teacher``.
            parallel: degrees that split both.
            setting: ``stage.teacher=<folder>``, for the sentence.

        Raises:
            ConfigurationError: it has nothing to teach.
            CheckpointError: it is of another architecture.
        """

    def check_plan(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """What a dry run, which reads no teacher, can tell of :meth:`check_teacher`.

        Raises:
            ConfigurationError: no teacher could teach ``model`` under these degrees.
        """
        return

    def check_files(self, config: RunConfig, samples: range) -> None:
        """Files of its own that the run names beside data and checkpoints.

        Args:
            config: the run, whose data are there.
            samples: the training samples that it reads, behind those of the steps that are done.

        Raises:
            ConfigurationError, DataError, CheckpointError: they do not fit the run.
        """
        return

    @abstractmethod
    def trainable_parameters(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """Parameters with a gradient on a rank of ``pipeline_stage``, as (routed experts, all others)."""

    def trainable_matrices(self, config: RunConfig, pipeline_stage: int) -> tuple[int, int]:
        """Those of them that are matrices of hidden layers, of which Muon keeps a momentum and no moments.

        A kind that does not say so is planned as if it had none.
        """
        return 0, 0

    @abstractmethod
    def trainable_parameters_in_all(self, model: ModelConfig) -> int:
        """Distinct parameters with a gradient, whose optimizer state a checkpoint holds."""

    @abstractmethod
    def flops_per_token(self, config: RunConfig) -> float:
        """Model FLOPs of one token of training, the numerator of MFU. Recomputation does not count."""

    @abstractmethod
    def activation_bytes(self, config: RunConfig, pipeline_stage: int, micro_batches: int) -> float:
        """Bytes that a rank of ``pipeline_stage`` keeps for the backward pass of ``micro_batches``."""
