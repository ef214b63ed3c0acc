"""The L2 norm of a model's weights, each counted once wherever it lies."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.process_groups import ProcessGroups


def parameter_norm(model: HybridGPTModel | ModelChunks, groups: ProcessGroups) -> Tensor:
    """L2 norm over all ranks. A collective of all of them; the host does not wait.

    Args:
        model: this rank's pipeline stages, their weights as of the last update.
        groups: process groups.

    Returns:
        [] float64 on the device, the same on every rank.
    """
    copied = [_copied_embedding(chunk) for chunk in model.chunks]
    counted = (each for each in model.parameters() if not any(each is copy for copy in copied))
    return norm_of_shares(((share_of_rank(each, groups), each.detach()) for each in counted), groups)


def norm_of_shares(tensors: Iterable[tuple[float, Tensor]], groups: ProcessGroups) -> Tensor:
    """L2 norm over all ranks of what each holds; a collective of all of them.

    Args:
        tensors: of this rank, each with one over the ranks that hold the same numbers.
        groups: process groups.

    Returns:
        [] float64 on the device, the same on every rank.
    """
    held: dict[float, list[Tensor]] = {}
    for share, tensor in tensors:
        held.setdefault(share, []).append(tensor)
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    for share, alike in held.items():
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(alike, dtype=torch.float32)])
        total += share * norms.square().sum()
    torch.distributed.all_reduce(total)
    return total.sqrt()


def _copied_embedding(model: HybridGPTModel) -> Tensor | None:
    """The last stage's copy of the first one's embedding, where models of several stages share it."""
    if model.share_embeddings_and_output_weights and model.post_process and not model.pre_process:
        return model.shared_embedding_or_output_weight()
    return None


def share_of_rank(parameter: torch.nn.Parameter, groups: ProcessGroups) -> float:
    """One over the ranks that hold the same numbers, as megatron-core marks parameters."""
    distinct = groups.pipeline_model_parallel_size
    is_split = getattr(parameter, "tensor_model_parallel", False)
    if not getattr(parameter, "allreduce", True):  # of a routed expert
        distinct *= groups.expert_model_parallel_size
        distinct *= groups.expert_tensor_parallel_size if is_split else 1
    elif is_split:
        distinct *= groups.tensor_model_parallel_size
    return distinct / groups.world_size
