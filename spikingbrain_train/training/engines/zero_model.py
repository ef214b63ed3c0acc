"""A model under DeepSpeed's ZeRO as megatron-core's schedules and gradient finalization call it."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from torch import Tensor

from spikingbrain_train.models.gpt_model import HybridGPTModel


class ZeroModel(_BaseDataParallel):
    """What stands where megatron-core has its DistributedDataParallel.

    Its forward pass is the model's own, not that of DeepSpeed's engine: that one prepares the backward pass
    of its outputs, and a stage may run autograd from elsewhere (an align stage does, once a mixer).

    Args:
        model: with DeepSpeed's hooks on its parameters.
        finish: called once all backward passes of a step are done.
    """

    def __init__(self, model: HybridGPTModel, finish: Callable[[], None]) -> None:
        super().__init__(config=model.config, module=model)
        model.config.calculate_per_token_loss = True
        model.config.finalize_model_grads_func = finalize_model_grads
        self.ddp_config = DistributedDataParallelConfig()  # which megatron-core asks for more than one kind
        self._finish = finish
        self.scaling: float = 1.0
        """What the sum of gradients over ranks is multiplied by."""

    def zero_grad_buffer(self) -> None:
        """Nothing: the engine forgets gradients before a step."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Have this rank's share of the gradients ready; megatron-core's argument asks for nothing here."""
        self._finish()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Keep the factor, which the update applies together with the clipping."""
        self.scaling *= float(scaling_factor)
