"""Converted checkpoints in the trainer's model. The functions run on the ranks of the pool."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import Precision
from spikingbrain_train.storage.checkpoint_folder import (
    MODEL_CONFIG_FILE,
    iteration_folder,
    latest_checkpoint,
)

if TYPE_CHECKING:
    from spikingbrain_train.models.gpt_model import HybridGPTModel
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOKENS = torch.randint(0, 101, (2, 50), generator=torch.Generator().manual_seed(0))


def load_megatron_model(groups: ProcessGroups, folder: Path) -> HybridGPTModel:
    """This rank's stage in fp32, filled by megatron-core from the newest checkpoint in ``folder``."""
    from spikingbrain_train.checkpoint.torch_dist import load_shards
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config

    checkpoint = latest_checkpoint(folder, "folder")
    config = load_model_config(checkpoint / MODEL_CONFIG_FILE)
    parallel = ParallelConfig(
        tensor_model_parallel_size=groups.tensor_model_parallel_size,
        pipeline_model_parallel_size=groups.pipeline_model_parallel_size,
        expert_model_parallel_size=groups.expert_model_parallel_size,
        expert_tensor_parallel_size=groups.expert_tensor_parallel_size,
    )
    megatron = transformer_config(config, parallel, Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator)
    model = build_model(config, megatron, kernels, groups.device)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what the checkpoint does not fill will show
    loaded = load_shards(_sharded_weights(model), checkpoint)
    weights = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    result = model.load_state_dict(weights, strict=False)
    assert not [name for name in result.missing_keys if not name.endswith("_extra_state")]
    return model.eval()


def _sharded_weights(model: HybridGPTModel) -> dict[str, Any]:
    """The model's weights as the trainer saves and loads them: tensors only, one key per layer."""
    sharded = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    return {name: value for name, value in sharded.items() if not name.endswith("_extra_state")}


def megatron_logits(
    groups: ProcessGroups, folder: Path, sub_norm_share: float | None = None
) -> torch.Tensor | None:
    """[B, T, vocab_size] logits of TOKENS without padding, the same on every rank of the last pipeline stage
    (tensor-parallel ranks gather theirs); None on stages before it. With sub-norms that have come in so
    far."""
    from spikingbrain_train.models.linears.sub_norm import set_share

    model = load_megatron_model(groups, folder)
    if sub_norm_share is not None:
        set_share(model, sub_norm_share)
    return _logits(groups, model)


def _logits(groups: ProcessGroups, model: HybridGPTModel) -> torch.Tensor | None:
    stages, stage = groups.collection.pp, groups.pipeline_model_parallel_rank
    config = model.model_config
    if not groups.is_pipeline_first_stage:
        hidden = torch.empty(config.num_sink_tokens + TOKENS.shape[1], len(TOKENS), config.hidden_size)
        torch.distributed.recv(hidden, torch.distributed.get_global_rank(stages, stage - 1))
        model.set_input_tensor([hidden])
    with torch.no_grad():
        output = model(TOKENS)
    assert isinstance(output, torch.Tensor)
    if not groups.is_pipeline_last_stage:
        torch.distributed.send(output, torch.distributed.get_global_rank(stages, stage + 1))
        return None
    parts = [torch.empty_like(output) for _ in range(groups.tensor_model_parallel_size)]
    torch.distributed.all_gather(parts, output.contiguous(), group=groups.collection.tp)
    return torch.cat(parts, dim=-1)[..., : config.vocab_size]


def logits_and_save(groups: ProcessGroups, folder: Path, target: Path) -> torch.Tensor | None:
    """Logits of the checkpoint in ``folder``, and its weights saved again from these ranks to ``target``."""
    from tests.checkpoint.shards import save_shards

    model = load_megatron_model(groups, folder)
    checkpoint = iteration_folder(target, 3)
    if groups.is_main_process:
        source = latest_checkpoint(folder, "folder")
        shutil.copytree(source / "hf_source", checkpoint / "hf_source")
        shutil.copy(source / MODEL_CONFIG_FILE, checkpoint)
        (target / "latest_checkpointed_iteration.txt").write_text("3")
    torch.distributed.barrier()
    save_shards({"model": _sharded_weights(model), "iteration": 3}, checkpoint)
    return _logits(groups, model)


def parameters_of_stage(groups: ProcessGroups, folder: Path) -> dict[str, torch.Tensor]:
    """The parameters that this rank holds, under their local names."""
    model = load_megatron_model(groups, folder)
    return {name: parameter.data for name, parameter in model.named_parameters()}
