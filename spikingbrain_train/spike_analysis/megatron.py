"""Spikes in front of the projections of a Megatron checkpoint, on all of its ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from spikingbrain_train.architecture.layers import projections_of
from spikingbrain_train.architecture.spikes import SPIKES
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.evaluation.checkpoint_model import CheckpointModel, open_checkpoint
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.models.linears.linear_transform import Shard
from spikingbrain_train.models.linears.transformed_linear import TransformedLinear
from spikingbrain_train.models.linears.whole_model import set_attributes
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.spike_analysis.linear_records import Linear, LinearRecord, Records, SharedInputs
from spikingbrain_train.spike_analysis.spiking_model import SpikingModel

_EXPERT = re.compile(r"\.\d+(?=\.)")


def with_spikes(model: ModelConfig) -> ModelConfig:
    """The network with spikes where it was trained with them, else in front of all of its projections."""
    if model.spiking.projections:
        return model
    present = projections_of(model)
    everywhere = [each for each in Projection if each in present]
    return replace(model, spiking=replace(model.spiking, projections=everywhere))


class MegatronSpikes(SpikingModel):
    """A checkpoint on ranks that have joined; every rank calls every method.

    Args:
        request: the checkpoint as it is asked for reading.
        groups: of the ranks.
        tokenizer: of its text.
        tokens: of each text; ranks read one at a time.

    Raises:
        SpikingBrainError: as :func:`~spikingbrain_train.evaluation.checkpoint_model.open_checkpoint`.
    """

    def __init__(
        self, request: CheckpointRequest, groups: ProcessGroups, tokenizer: TextTokenizer, tokens: int
    ) -> None:
        model = request.model
        self.opened: CheckpointModel = open_checkpoint(replace(request, model=with_spikes(model)), groups)
        self.name = str(request.checkpoint)
        self.num_layers = model.num_layers
        self.language_model = MegatronLanguageModel(
            self.opened.model, groups, tokenizer, tokens_per_batch=tokens
        )
        self._groups = groups
        self._linears = list(_linears(self.opened.model))
        self.k = self._own_k(request) if model.spiking.projections else None

    @contextmanager
    def spikes(self, k: float) -> Iterator[Records]:
        records = Records()
        inputs = SharedInputs(records)
        set_attributes(self.opened.model, SPIKES.name, {"k": k})
        with ExitStack() as stack:
            for linear, module in self._linears:
                transform: Any = module.transforms[SPIKES.name]
                transform.statistics = _Counter(records, linear, module, self._groups.device)
                stack.callback(setattr, transform, "statistics", None)
                stack.callback(module.register_forward_pre_hook(_hook(inputs, linear)).remove)
            yield records

    @contextmanager
    def no_spikes(self) -> Iterator[None]:
        held = [(module, dict(module.transforms)) for _, module in self._linears]
        try:
            for module, _ in held:
                del module.transforms[SPIKES.name]
            yield
        finally:
            for module, transforms in held:
                module.transforms = transforms

    def gathered(self, records: Records) -> Records:
        mine = records.to_cpu()
        parts: list[Any] = [mine]
        if self._groups.world_size > 1:
            parts = [None] * self._groups.world_size
            torch.distributed.all_gather_object(parts, mine)
        return Records.merged(parts)

    @staticmethod
    def _own_k(request: CheckpointRequest) -> float:
        if request.run is None or request.iteration is None:
            return request.model.spiking.k
        return SPIKES.schedule(request.model, request.run.stage, request.iteration)["k"]


class _Counter:
    """Stands where a transform's statistics do."""

    def __init__(
        self, records: Records, linear: Linear, module: TransformedLinear, device: torch.device
    ) -> None:
        self._records, self._linear, self._device = records, linear, device
        self._shard: Shard = module.input_shard
        weight = next(
            each for name, each in module.named_parameters(recurse=False) if name.startswith("weight")
        )
        split = self._shard.group.size() if module.weight_split_axis == 0 else 1
        self._outputs = weight.shape[0] * split

    def add(self, counts: Tensor) -> None:
        """See :meth:`~spikingbrain_train.models.linears.spike_statistics.SpikeStatistics.add`."""
        shard, part = self._shard, counts.shape[-1]
        record = self._records.linears.get(self._linear)
        if record is None:
            record = LinearRecord(part * shard.parts, self._outputs, self._device)
            self._records.linears[self._linear] = record
        record.add(counts, 0 if shard.axis is None else shard.group.rank() * part)


def _hook(inputs: SharedInputs, linear: Linear) -> Any:
    def look(_: TransformedLinear, arguments: tuple[Tensor, ...]) -> None:
        inputs.first_reader(linear, arguments[0])

    return look


def _linears(model: torch.nn.Module) -> Iterator[tuple[Linear, TransformedLinear]]:
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        for path, module in layer.named_modules():
            if isinstance(module, TransformedLinear) and SPIKES.name in module.transforms:
                yield Linear(layer.layer_number - 1, _EXPERT.sub("", path)), module
