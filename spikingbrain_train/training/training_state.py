"""What changes while a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from spikingbrain_train.checkpoint.sharded_state import HasState
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.training.current_weights import gather_updated_weights
from spikingbrain_train.training.parallel_chunks import ParallelChunks, parallel_chunks


@dataclass
class TrainingState:
    """What changes while a run trains, and so is in its checkpoints."""

    data_parallel: DistributedDataParallel | ParallelChunks
    """This rank's pipeline stage, or its virtual ones, as it trains."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    callbacks: HasState
    """What hangs on the run's hooks."""
    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences read from the training data so far."""

    @property
    def model(self) -> HybridGPTModel | ModelChunks:
        """This rank's pipeline stage itself."""
        return self.data_parallel.module

    def gather_updated_weights(self) -> None:
        """Bring every weight on every rank up to the last optimizer step; all ranks call it together."""
        for chunk in parallel_chunks(self.data_parallel):
            gather_updated_weights(chunk)
