"""Weights are those of the last update wherever somebody reads them.

With ``parallel.overlap_param_gather`` an update leaves each data-parallel rank with its own shard of new
weights and old ones everywhere else. megatron-core gathers the rest in the next forward pass, bucket by
bucket, in hooks of the modules that own the parameters. Two kinds of readers would meet old weights:

- Who reads them outside of a forward pass calls :func:`gather_updated_weights` first.
- A module that reads a parameter of another one, whose hook does not run, such as the loss, which multiplies
  by the output layer's weight itself, waits in a hook that :func:`gather_before_reading` gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel

from spikingbrain_train.models.gpt_model import HybridGPTModel


def gather_updated_weights(model: DistributedDataParallel) -> None:
    """Bring every weight on every rank up to the last optimizer step; all ranks call it together.

    Without ``overlap_param_gather`` the optimizer step has done it, and nothing happens. The next forward
    pass does not gather again.
    """
    if model.ddp_config.overlap_param_gather:
        model.start_param_sync(force_sync=True)


def gather_before_reading(model: DistributedDataParallel) -> None:
    """Make a forward pass wait for every weight that it reads, whichever module owns it.

    Called once, when ``model`` has been wrapped. Mixers and feed-forwards wait for all that is inside them
    (an expert without tokens runs no hook of its own either), and the final norm for the output layer's
    weight, which follows it.
    """
    if not model.ddp_config.overlap_param_gather:
        return
    stage: HybridGPTModel = model.module
    for layer in stage.decoder.layers:
        for part in layer.children():
            _wait_before(part, model, part.parameters)
    if stage.post_process:
        _wait_before(stage.decoder.final_layernorm, model, lambda: [stage.output_weight()])


def _wait_before(
    module: torch.nn.Module,
    model: DistributedDataParallel,
    parameters: Callable[[], Iterable[torch.Tensor]],
) -> None:
    module.register_forward_pre_hook(partial(_finish_gathering, model, parameters))


def _finish_gathering(
    model: DistributedDataParallel,
    parameters: Callable[[], Iterable[torch.Tensor]],
    module: torch.nn.Module,
    inputs: tuple,
) -> None:
    for parameter in parameters():
        if parameter in model.param_to_bucket_group:  # frozen parameters are in none
            model.param_to_bucket_group[parameter].finish_param_sync()
