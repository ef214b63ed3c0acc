"""megatron-core's data parallelism and optimizer: every topology, optionally its distributed optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from spikingbrain_train.checkpoint.optimizer_state import begin_state
from spikingbrain_train.checkpoint.sharded_state import (
    fill_megatron_state,
    megatron_state_to_fill,
    megatron_state_to_save,
)
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.training.build import wrap_data_parallel
from spikingbrain_train.training.current_weights import gather_updated_weights
from spikingbrain_train.training.engines.engine import Engine
from spikingbrain_train.training.optimizer import build_optimizer, gradient_norm, update_weights
from spikingbrain_train.training.parallel_chunks import parallel_chunks


class MegatronEngine(Engine):
    """See :class:`Engine`.

    Args:
        config: the run.
        model: this rank's pipeline stage, or its virtual ones, frozen where it is not to train.
    """

    def __init__(self, config: RunConfig, model: HybridGPTModel | ModelChunks) -> None:
        self.model = wrap_data_parallel(model, config.parallel)
        self.optimizer = build_optimizer(config.optimizer, config.parallel, config.precision, self.model)

    def begin_gradients(self) -> None:
        """Zero the buffers that gradients are added to."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update_weights(self, check: Callable[[float], None]) -> float:
        """See :meth:`Engine.update_weights`."""
        return update_weights(self.optimizer, check)

    def gradient_norm(self) -> float:
        """See :meth:`Engine.gradient_norm`."""
        return gradient_norm(self.optimizer)

    def gradients(self) -> Iterator[Tensor]:
        """Those of this rank's parameters, with those of others in a buffer that is not sharded yet."""
        for parameter in self.model.parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                yield gradient

    def begin_state(self) -> None:
        """No moments, and no steps."""
        begin_state(self.optimizer)

    def follow_weights(self) -> None:
        """See :meth:`Engine.follow_weights`."""
        self.optimizer.reload_model_params()

    def gather_updated_weights(self) -> None:
        """Needed where ``parallel.overlap_param_gather`` leaves it to the next forward pass."""
        for chunk in parallel_chunks(self.model):
            gather_updated_weights(chunk)

    def state_to_save(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_save`."""
        return megatron_state_to_save(self.model.module, self.optimizer)

    def state_to_fill(self) -> dict[str, Any]:
        """See :meth:`Engine.state_to_fill`."""
        return megatron_state_to_fill(self.model.module, self.optimizer)

    def fill_state(self, loaded: dict[str, Any]) -> None:
        """See :meth:`Engine.fill_state`."""
        fill_megatron_state(self.model.module, self.optimizer, loaded)
