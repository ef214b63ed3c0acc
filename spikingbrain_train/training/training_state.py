"""What changes while a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from spikingbrain_train.checkpoint.sharded_state import HasState
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.training.engines.engine import Engine


@dataclass
class TrainingState:
    """What changes while a run trains, and so is in its checkpoints."""

    engine: Engine
    """Model and optimizer."""
    scheduler: OptimizerParamScheduler
    callbacks: HasState
    """What hangs on the run's hooks."""
    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences read from the training data so far."""

    @property
    def data_parallel(self) -> Any:
        """This rank's pipeline stage, or its virtual ones, as it trains."""
        return self.engine.model

    @property
    def optimizer(self) -> Any:
        """As schedule and checkpoints see it."""
        return self.engine.optimizer

    @property
    def model(self) -> HybridGPTModel | ModelChunks:
        """This rank's pipeline stage itself."""
        model: HybridGPTModel | ModelChunks = self.engine.model.module
        return model

    def gather_updated_weights(self) -> None:
        """Bring every weight on every rank up to the last optimizer step; all ranks call it together."""
        self.engine.gather_updated_weights()

    def learnt_to_save(self) -> dict[str, Any]:
        """``model`` and ``optimizer`` of a checkpoint."""
        return self.engine.state_to_save()

    def learnt_to_fill(self) -> dict[str, Any]:
        """What to read of a checkpoint for :meth:`fill_learnt`."""
        return self.engine.state_to_fill()

    def fill_learnt(self, loaded: dict[str, Any]) -> None:
        """Take up the weights and the optimizer state that were read."""
        self.engine.fill_state(loaded)
