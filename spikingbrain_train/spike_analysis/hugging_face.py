"""Spikes in front of the linears of a Hugging Face model: any that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.ops.spike_encoding import spike_counts
from spikingbrain_train.spike_analysis.fused_experts import FusedExperts
from spikingbrain_train.spike_analysis.linear_records import (
    Counted,
    Linear,
    LinearRecord,
    Records,
    SharedInputs,
)
from spikingbrain_train.spike_analysis.spiking_model import SpikingModel

_IN_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.\d+(?=\.)")
_ROUTERS = ("gate", "router")
_ENCODER = "SpikeEncoder"
"""Of the modelling code that exports carry."""
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class HuggingFaceSpikes(SpikingModel):
    """Every ``torch.nn.Linear`` but the output head and routers reads spikes, and so does every expert.

    Of linears one behind the other (the low-rank gate) the first does, as in
    ``model.spiking.gate_encoding=once``. An export of a model that was trained with spikes has encoders of
    its own: what is behind one of them reads spikes, and nothing else; they are passed by meanwhile.

    Args:
        model: in evaluation mode.
        tokenizer: of its text.
        name: for the report.

    Raises:
        CheckpointError: it has no such linears, or experts that cannot be counted.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: TextTokenizer, name: str) -> None:
        self.name, self.k = name, None
        self.num_layers = int(model.config.num_hidden_layers)
        self._encoders = [each for each in model.modules() if type(each).__name__ == _ENCODER]
        self._linears = _linears(model, every_matrix=bool(self._encoders))
        if self._encoders:
            self.k = float(cast(Any, self._encoders[0]).k)
            self._linears = _behind(model, self._encoders, self._linears)
        if not self._linears:
            raise CheckpointError(
                f"{name} has no torch.nn.Linear beside its output head to count spikes in front of; import "
                "it with spikingbrain-convert and name the checkpoint"
            )
        fused = {} if self._encoders else _fused_experts(model)
        self._fused = FusedExperts(model, fused, name)
        # One text at a time: another in its batch would be padding, which counts, too.
        self.language_model = HuggingFaceLanguageModel(model, tokenizer, tokens_per_batch=1)

    @contextmanager
    def spikes(self, k: float) -> Iterator[Records]:
        records = Records()
        inputs = SharedInputs(records)
        encoded: dict[Linear, tuple[Tensor, Counted]] = {}

        def encode(linear: Linear, weight: Tensor, x: Tensor) -> Tensor:
            first = inputs.first_reader(linear, x)
            record = records.linears.get(linear)
            if record is None:
                outputs, width = weight.shape
                record = records.linears[linear] = LinearRecord(width, outputs, x.device)
            if first == linear:
                encoded.clear()
            if first in encoded:
                record.add_counted(encoded[first][1])
            else:
                counts, threshold = spike_counts(x, k)
                encoded[first] = (counts * threshold).to(x.dtype), record.add(counts)
            return encoded[first][0]

        with ExitStack() as stack:
            stack.enter_context(self.no_spikes())
            stack.enter_context(self._fused.reading(encode))
            for linear, modules in self._linears.items():
                for module in modules:
                    stack.callback(module.register_forward_pre_hook(_hook(encode, linear)).remove)
            yield records

    @contextmanager
    def no_spikes(self) -> Iterator[None]:
        with ExitStack() as stack:
            for encoder in self._encoders:
                stack.callback(encoder.register_forward_hook(lambda _, inputs, output: inputs[0]).remove)
            yield


def _hook(encode: Any, linear: Linear) -> Any:
    return lambda module, inputs: (encode(linear, module.weight, inputs[0]), *inputs[1:])


def _fused_experts(model: PreTrainedModel) -> dict[Linear, torch.nn.Parameter]:
    """Parameters that hold one matrix of every expert of their layer."""
    experts, found = _numbers_of_experts(model), {}
    for path, parameter in model.named_parameters():
        inside = _IN_LAYER.search(f".{path}")
        if inside and parameter.dim() == 3 and parameter.shape[0] in experts:
            found[Linear(int(inside[1]), inside[2])] = parameter
    return found


def _numbers_of_experts(model: PreTrainedModel) -> set[int]:
    found = (getattr(model.config, name, None) for name in _NUMBERS_OF_EXPERTS)
    return {number for number in found if isinstance(number, int)}


def _linears(model: PreTrainedModel, every_matrix: bool) -> dict[Linear, list[torch.nn.Linear]]:
    head = model.get_output_embeddings()
    experts = _numbers_of_experts(model)
    found: dict[Linear, list[torch.nn.Linear]] = {}
    second = {
        each
        for module in model.modules()
        if isinstance(module, torch.nn.Sequential) and not every_matrix
        for each in list(module)[1:]
    }
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is head or module in second:
            continue
        if path.rsplit(".", 1)[-1] in _ROUTERS and module.out_features in experts:
            continue
        inside = _IN_LAYER.search(f".{path}")
        layer, name = (int(inside[1]), inside[2]) if inside else (-1, path)
        found.setdefault(Linear(layer, _EXPERT.sub("", name)), []).append(module)
    return found


@torch.no_grad()
def _behind(
    model: PreTrainedModel, encoders: list[torch.nn.Module], linears: dict[Linear, list[torch.nn.Linear]]
) -> dict[Linear, list[torch.nn.Linear]]:
    """Those that read what an encoder gives, found out on a few tokens.

    Experts that these tokens do not reach do what the others of their layer do.
    """
    encoded: list[Tensor] = []
    reading: set[Linear] = set()

    def look(linear: Linear, x: Tensor) -> None:
        if any(x is each for each in encoded):
            reading.add(linear)

    with ExitStack() as stack:
        for encoder in encoders:
            remember = encoder.register_forward_hook(lambda _, inputs, output: encoded.append(output))
            stack.callback(remember.remove)
        for linear, modules in linears.items():
            for module in modules:
                hook = module.register_forward_pre_hook(
                    lambda _, inputs, linear=linear: look(linear, inputs[0])
                )
                stack.callback(hook.remove)
        tokens = torch.arange(8, device=model.device).remainder(int(model.config.vocab_size))
        model.base_model(input_ids=tokens.unsqueeze(0), use_cache=False)
    return {linear: modules for linear, modules in linears.items() if linear in reading}
