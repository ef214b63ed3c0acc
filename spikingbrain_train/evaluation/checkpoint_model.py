"""A Megatron checkpoint as a model on all ranks of this launch: its weights alone, for inference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from spikingbrain_train.architecture.linear_transforms import transforms_of
from spikingbrain_train.checkpoint.loading import load_weights_of
from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.config.run import Precision
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks, build_model
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.models.linears.sub_norm import set_share
from spikingbrain_train.models.linears.whole_model import choose, set_attributes
from spikingbrain_train.models.transformer_config import transformer_config
from spikingbrain_train.parallel.agreed_precision import agreed_choice
from spikingbrain_train.parallel.process_groups import ProcessGroups, destroy, initialize
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE, slow_format_warning
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE
from spikingbrain_train.storage.stored_layers import check_number_of_layers

_SEED = 1234
"""Of generators that nothing draws from: weights are read, and there is no dropout."""


@dataclass(frozen=True)
class CheckpointModel:
    """What was built on this rank."""

    model: HybridGPTModel | ModelChunks
    """Its pipeline stage, in evaluation mode and without gradients."""
    request: CheckpointRequest
    """With the precision settled."""
    groups: ProcessGroups
    kernels: KernelConfig

    @property
    def dtype(self) -> str:
        """Number format of weights and activations, by torch's name."""
        return str(PARAMS_DTYPE[self.request.precision]).removeprefix("torch.")

    def choose(self, choice: str) -> None:
        """Compute from here on with one of the adapters that stand beside the weights, the others off."""
        choose(self.model, self.request.model, choice)


@contextmanager
def checkpoint_model(request: CheckpointRequest) -> Iterator[CheckpointModel]:
    """Join the ranks, build the model and read its weights; leaves the ranks' groups afterwards.

    Raises:
        SpikingBrainError: the checkpoint is damaged, or the platform is not there.
    """
    with joined_ranks(request) as groups:
        yield open_checkpoint(request, groups)


@contextmanager
def joined_ranks(request: CheckpointRequest) -> Iterator[ProcessGroups]:
    """The groups of the ranks, on which models may be opened, one after the other or several.

    Raises:
        SpikingBrainError: the platform is not there.
    """
    try:
        yield initialize(request.parallel, detect(request.device), seed=_SEED)
    finally:
        destroy()


def open_checkpoint(request: CheckpointRequest, groups: ProcessGroups) -> CheckpointModel:
    """Build a model on ranks that have joined, and read its weights.

    Args:
        request: of the degrees that the ranks were joined for; sequence parallelism may differ.
        groups: of :func:`joined_ranks`.

    Raises:
        SpikingBrainError: the checkpoint is damaged, or its number format is not there.
    """
    accelerator = groups.accelerator
    request = replace(request, precision=_settled(request.precision, groups))
    dtype, model = PARAMS_DTYPE[request.precision], request.model
    accelerator.require_dtype(dtype)
    slow = slow_format_warning(f"--dtype {str(dtype).removeprefix('torch.')}", dtype, accelerator)
    if slow is not None and groups.is_main_process:
        print(slow, file=sys.stderr, flush=True)
    kernels = resolve_kernels(KernelConfig(), accelerator, model=model, precision=request.precision)
    with activity(f"loading {request.checkpoint}", shown=groups.is_main_process):
        built = _build(request, kernels, groups)
    return CheckpointModel(built, request, groups, kernels)


def _settled(precision: Precision, groups: ProcessGroups) -> Precision:
    return agreed_choice(groups).precision if precision is Precision.auto else precision


def _build(
    request: CheckpointRequest, kernels: KernelConfig, groups: ProcessGroups
) -> HybridGPTModel | ModelChunks:
    from spikingbrain_train.runtime.checkpoint_metadata import read_metadata

    model, parallel = request.model, request.parallel
    check_number_of_layers(
        f"{request.checkpoint / MODEL_CONFIG_FILE}: num_layers",
        model.num_layers,
        lambda: read_metadata(request.checkpoint).state_dict_metadata,
    )
    config = transformer_config(
        model, parallel, request.precision, on_cpu=not groups.accelerator.is_gpu, initialize=False
    )
    built = build_model(model, config, kernels, groups.device, parallel.context_parallel)
    load_weights_of(request.checkpoint, f"{request.flag}={request.named}", built)
    if request.run is not None and request.iteration is not None:
        # Spikes that still grow coarser, and norms that still come in, are what they were in the run's own
        # evaluation at this step.
        for kind in transforms_of(model):
            values = kind.schedule(model, request.run.stage, request.iteration)
            set_attributes(built, kind.name, values)
        set_share(built, request.run.stage.sub_norm_annealing.share(request.iteration))
    return built.requires_grad_(False).eval()
