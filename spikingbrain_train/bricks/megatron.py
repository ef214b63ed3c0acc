"""Neurons of a Megatron checkpoint, on all of its ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from spikingbrain_train.activation_sparsity.gate_records import Part
from spikingbrain_train.bricks.neuron_model import FeedForward, NeuronModel
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.checkpoint_model import open_checkpoint
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.models.linears.transformed_linear import TransformedLinear
from spikingbrain_train.parallel.process_groups import ProcessGroups

_LOCAL_EXPERT = re.compile(r"(\.local_experts\.)(\d+)")


def megatron_neurons(
    request: CheckpointRequest, groups: ProcessGroups, tokenizer: TextTokenizer, tokens: int
) -> NeuronModel:
    """Those of every feed-forward and expert; every rank calls it, and every method.

    Args:
        request: the checkpoint as it is asked for reading.
        groups: of the ranks, which have joined.
        tokenizer: of its text.
        tokens: of each text; ranks read one at a time.

    Raises:
        SpikingBrainError: as :func:`~spikingbrain_train.evaluation.checkpoint_model.open_checkpoint`, and
            where a kernel hides what experts compute.
    """
    opened = open_checkpoint(request, groups)
    found = list(_feed_forwards(opened.model, request, groups))
    ranks = "" if groups.world_size == 1 else f"; {groups.describe()}"
    model = NeuronModel(
        MegatronLanguageModel(opened.model, groups, tokenizer, tokens_per_batch=tokens),
        name=str(request.checkpoint),
        form=f"Megatron{ranks}",
        dtype=opened.dtype,
        feed_forwards=found,
        gather=None if groups.world_size == 1 else _gather,
    )
    if not any(model.gathered(len(found))):
        raise CheckpointError(f"{request.checkpoint} has no feed-forwards whose neurons can be watched")
    return model


def _gather(mine: Any) -> list[Any]:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def _feed_forwards(
    model: torch.nn.Module, request: CheckpointRequest, groups: ProcessGroups
) -> Iterator[FeedForward]:
    parallel, collection = request.parallel, groups.collection
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        for path, module in layer.named_modules():
            if path.endswith(".experts") and not hasattr(module, "local_experts"):
                raise CheckpointError(
                    f"{request.checkpoint} has experts, which a grouped kernel computes at once here; add "
                    "--device cpu"
                )
            if not isinstance(module, MLP):
                continue
            is_routed, copies = ".local_experts." in path, 1
            if is_routed:
                # Where tensor-parallel ranks hold all tokens, each of them sends them to the routed experts.
                copies = 1 if parallel.sequence_parallel else parallel.tensor_model_parallel_size
                path = _numbered(path, collection.ep.rank() * len(layer.mlp.experts.local_experts))
            group = collection.expt_tp if is_routed else collection.tp
            part = Part(layer.layer_number - 1, path, (group.rank(),))
            norms = _norms(module.linear_fc2)
            yield FeedForward(part, module.linear_fc2, norms, group, module.linear_fc1, copies)


def _numbered(path: str, first: int) -> str:
    """The path of an expert of this rank with its number among all."""
    return _LOCAL_EXPERT.sub(lambda found: f"{found[1]}{first + int(found[2])}", path)


@torch.no_grad()
def _norms(down: Any) -> Tensor:
    """[channels] float32, of the columns that multiply: of ternary weights those that are rounded."""
    transformed = down.transformed_weights() if isinstance(down, TransformedLinear) else nullcontext()
    with transformed:
        weight: Tensor = getattr(down, "weight")  # noqa: B009  (torch's own __getattr__ has no type)
        return weight.float().norm(dim=0)
