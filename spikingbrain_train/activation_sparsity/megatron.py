"""Gates in the feed-forwards of a Megatron checkpoint, on all of its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from spikingbrain_train.activation_sparsity.gate_records import GateRecords, Part
from spikingbrain_train.activation_sparsity.gated_model import GatedModel
from spikingbrain_train.evaluation.checkpoint_model import CheckpointModel, open_checkpoint
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.models.feed_forwards.gated_activation import GatedActivation
from spikingbrain_train.parallel.process_groups import ProcessGroups


class MegatronGates(GatedModel):
    """A checkpoint on ranks that have joined; every rank calls every method.

    Experts of one grouped GEMM (GPUs) are counted channel by channel over the experts of a rank together.

    Args:
        request: the checkpoint as it is asked for reading; its activation is relu or fatrelu.
        groups: of the ranks.
        tokenizer: of its text.
        tokens: of each text; ranks read one at a time.

    Raises:
        SpikingBrainError: as :func:`~spikingbrain_train.evaluation.checkpoint_model.open_checkpoint`.
    """

    def __init__(
        self, request: CheckpointRequest, groups: ProcessGroups, tokenizer: TextTokenizer, tokens: int
    ) -> None:
        self.opened: CheckpointModel = open_checkpoint(request, groups)
        self.name = str(request.checkpoint)
        self.language_model = MegatronLanguageModel(
            self.opened.model, groups, tokenizer, tokens_per_batch=tokens
        )
        self._groups = groups
        self._gates = list(_gates(self.opened.model, groups))
        # Where tensor-parallel ranks hold all tokens, each of them sends them to the routed experts.
        parallel = request.parallel
        self._copies = 1 if parallel.sequence_parallel else parallel.tensor_model_parallel_size
        first = self._gates[0][1].threshold if self._gates else 0.0
        # A pipeline stage may hold no such layer; they all have the threshold of the model.
        self.threshold = max(_gathered(groups, first))

    @contextmanager
    def gates(self, threshold: float) -> Iterator[GateRecords]:
        records = GateRecords()
        with ExitStack() as stack:
            for part, gate in self._gates:
                copies = self._copies if _is_routed(part) else 1
                stack.callback(setattr, gate, "threshold", gate.threshold)
                gate.threshold = threshold
                stack.callback(gate.register_forward_hook(_hook(records, part, copies)).remove)
            yield records

    def gathered(self, records: GateRecords) -> GateRecords:
        return GateRecords.merged(_gathered(self._groups, GateRecords.merged([records])))


def _hook(records: GateRecords, part: Part, copies: int) -> Any:
    def count(_: torch.nn.Module, __: Any, product: Tensor) -> None:
        records.add(part, product, copies)

    return count


def _gathered(groups: ProcessGroups, mine: Any) -> list[Any]:
    parts: list[Any] = [mine]
    if groups.world_size > 1:
        parts = [None] * groups.world_size
        torch.distributed.all_gather_object(parts, mine)
    return parts


def _gates(model: torch.nn.Module, groups: ProcessGroups) -> Iterator[tuple[Part, GatedActivation]]:
    tensor, expert = groups.tensor_model_parallel_rank, groups.expert_model_parallel_rank
    expert_tensor = groups.collection.expt_tp.rank()
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        for path, module in layer.named_modules():
            if isinstance(module, GatedActivation):
                # Routed experts are spread in groups of their own; shared ones like dense feed-forwards.
                part = Part(layer.layer_number - 1, path)
                shard = (expert, expert_tensor) if _is_routed(part) else (0, tensor)
                yield part._replace(shard=shard), module


def _is_routed(part: Part) -> bool:
    return ".experts." in part.name
