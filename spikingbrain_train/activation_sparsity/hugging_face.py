"""Gates in the feed-forwards of a Hugging Face model: any with gate, up and down projection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikingbrain_train.activation_sparsity.gate_records import GateRecords, Part
from spikingbrain_train.activation_sparsity.gated_model import GatedModel
from spikingbrain_train.activation_sparsity.zero_checks import nothing_is_zero
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

_IN_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.(.+)")
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What a gated feed-forward of transformers is made of."""


class HuggingFaceGates(GatedModel):
    """Every module with ``act_fn`` between a gate and an up projection, experts included.

    Args:
        model: in evaluation mode.
        tokenizer: of its text.
        name: for the report.

    Raises:
        CheckpointError: it has no such modules, or their activation is never zero.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: TextTokenizer, name: str) -> None:
        self.name = name
        self.modules = dict(gated_modules(model))
        if not self.modules:
            raise CheckpointError(
                f"{name} has no feed-forwards with a gate, an up and a down projection as modules; import it "
                "with spikingbrain-convert and name the checkpoint"
            )
        found = [threshold_of(each.act_fn) for each in self.modules.values()]
        thresholds = {each for each in found if each is not None}
        if not thresholds:
            activation = next(iter(self.modules.values())).act_fn
            raise CheckpointError(nothing_is_zero(name, type(activation).__name__))
        if len(thresholds) > 1 or None in found:
            raise CheckpointError(
                f"{name} has gates of several kinds (thresholds {sorted(thresholds)}); models here have one"
            )
        self.threshold = thresholds.pop()
        # One text at a time: another in its batch would be padding, which counts, too.
        self.language_model = HuggingFaceLanguageModel(model, tokenizer, tokens_per_batch=1)

    @contextmanager
    def gates(self, threshold: float) -> Iterator[GateRecords]:
        records = GateRecords()
        with ExitStack() as stack:
            for part, module in self.modules.items():
                stack.callback(setattr, module, "act_fn", module.act_fn)
                module.act_fn = _Counter(records, part, threshold)
            yield records


class _Counter(torch.nn.Module):
    """Stands where ``act_fn`` does."""

    def __init__(self, records: GateRecords, part: Part, threshold: float) -> None:
        super().__init__()
        self._records, self._part, self._threshold = records, part, threshold

    def forward(self, gate: Tensor) -> Tensor:
        """FATReLU of [..., channels]."""
        closed = gate <= 0 if self._threshold == 0 else gate < self._threshold
        activated = gate.masked_fill(closed, 0)
        self._records.add(self._part, activated)
        return activated


def gated_modules(model: torch.nn.Module) -> Iterator[tuple[Part, Any]]:
    """Gated feed-forwards inside layers, in their order."""
    for path, module in model.named_modules():
        inside = _IN_LAYER.search(f".{path}")
        if inside and all(hasattr(module, part) for part in _PARTS):
            yield Part(int(inside[1]), inside[2]), module


def threshold_of(activation: torch.nn.Module) -> float | None:
    """Below which it is zero: 0 is ReLU; None where it has no such threshold."""
    if isinstance(activation, torch.nn.ReLU):
        return 0.0
    # Of the modelling code that an export carries: a class of its own in every folder.
    return float(activation.threshold) if type(activation).__name__ == "FATReLU" else None  # type: ignore[arg-type]


def check_zeros(model: torch.nn.Module, name: str) -> None:
    """That every gate's activation makes zeros of what is negative: relu, fatrelu, relu2.

    Raises:
        CheckpointError: one does not.
    """
    for _, module in gated_modules(model):
        if float(module.act_fn(torch.tensor(-1.0))) != 0:
            raise CheckpointError(nothing_is_zero(name, type(module.act_fn).__name__))
