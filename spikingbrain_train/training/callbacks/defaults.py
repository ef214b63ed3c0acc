"""The callbacks of every run, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.evaluation.evaluator import Evaluator
from spikingbrain_train.evaluation.held_out import HeldOutCrossEntropy
from spikingbrain_train.training.callbacks.activation_sparsity import ActivationSparsity
from spikingbrain_train.training.callbacks.alert_command import AlertCommand
from spikingbrain_train.training.callbacks.all_tokens import AllTokens
from spikingbrain_train.training.callbacks.bad_batches import BadBatches
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.callbacks.checkpointing import Checkpointing
from spikingbrain_train.training.callbacks.closing import Closing
from spikingbrain_train.training.callbacks.evaluation import Evaluation
from spikingbrain_train.training.callbacks.expert_load import ExpertLoadReport
from spikingbrain_train.training.callbacks.finite_checks import FiniteChecks
from spikingbrain_train.training.callbacks.linear_transforms import (
    LinearTransformSchedules,
    LinearTransformStatistics,
)
from spikingbrain_train.training.callbacks.memory_checkpointing import MemoryCheckpointing
from spikingbrain_train.training.callbacks.metrics_file import MetricsFile
from spikingbrain_train.training.callbacks.milestones import Milestones
from spikingbrain_train.training.callbacks.named import named_evaluators
from spikingbrain_train.training.callbacks.outside import outside_callbacks
from spikingbrain_train.training.callbacks.progress_lines import ProgressLines
from spikingbrain_train.training.callbacks.replicated_experts import ReplicatedExpertsReport
from spikingbrain_train.training.callbacks.router_schedule import RouterSchedule
from spikingbrain_train.training.callbacks.slow_ranks import SlowRanks
from spikingbrain_train.training.callbacks.speed import Speed
from spikingbrain_train.training.callbacks.start_up import StartUp
from spikingbrain_train.training.callbacks.stop_signals import StopSignals
from spikingbrain_train.training.callbacks.sub_norm_schedule import SubNormSchedule
from spikingbrain_train.training.callbacks.tensorboard import TensorBoard
from spikingbrain_train.training.callbacks.wall_time import WallTimeLimit
from spikingbrain_train.training.callbacks.weights_and_biases import WeightsAndBiases


def callbacks_of(config: RunConfig, more: Sequence[Callback] = ()) -> list[Callback]:
    """Our own, which do nothing in runs that they are not for, those that the config names, and ``more``.

    The progress line shows metrics in the order in which they are added: here.

    Raises:
        ConfigurationError: ``callbacks`` or ``logging.evaluators`` names something that is none.
    """
    return [
        Closing(),  # the first is the last to end
        MetricsFile(),
        TensorBoard(),
        WeightsAndBiases(),
        AlertCommand(),
        Milestones(),  # whose last alert is sent before those above end
        ProgressLines(),
        FiniteChecks(),
        BadBatches(),
        LinearTransformSchedules(),
        LinearTransformStatistics(),
        ExpertLoadReport(),
        ReplicatedExpertsReport(),
        RouterSchedule(),
        SubNormSchedule(),
        ActivationSparsity(),
        StartUp(),
        Speed(),
        SlowRanks(),
        AllTokens(),
        *outside_callbacks(config),
        *more,
        # A step is evaluated and saved when all others are done with it, and the run stops when it is saved.
        Evaluation([HeldOutCrossEntropy(), *_evaluators(config)]),
        MemoryCheckpointing(),
        Checkpointing(),
        WallTimeLimit(),
        StopSignals(),
    ]


def _evaluators(config: RunConfig) -> list[Evaluator]:
    return [each.make(Evaluator) for each in named_evaluators(config)]  # type: ignore[type-abstract]
