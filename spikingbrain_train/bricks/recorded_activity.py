"""Inputs of feed-forwards and which neurons are active behind them: recorded, and held against predictors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikingbrain_train.activation_sparsity.gate_records import Part
from spikingbrain_train.bricks.activity_predictor import Activity, Fitted, packed
from spikingbrain_train.bricks.neuron_model import FeedForward, NeuronModel
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.evaluation.text_windows import cross_entropy_of
from spikingbrain_train.planning.launch import memory_free


@dataclass
class _Parts:
    inputs: list[Tensor] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)


def record_activity(
    model: NeuronModel, windows: Sequence[Sequence[int]], what: str
) -> tuple[dict[Part, Activity], float]:
    """Let a model read, and keep what every feed-forward reads and which of its neurons are active.

    Tensor-parallel ranks each keep all tokens and channels. What is kept lies in host memory: h numbers and F
    bits for a token of a feed-forward.

    Returns:
        The activity by feed-forward, without those that no token was sent to, and the cross entropy in nats
        per token.

    Raises:
        PlatformError: there is not enough memory.
    """
    parts: dict[Part, _Parts] = {}
    _check_memory(model, sum(len(window) - 1 for window in windows))

    def keep(feed_forward: FeedForward, x: Tensor, inside: Tensor) -> None:
        inside_NF = inside.reshape(-1, inside.shape[-1])
        if not len(inside_NF):  # an expert that none of these tokens is sent to
            return
        active = feed_forward.all_channels((inside_NF != 0).to(torch.uint8))
        into = parts.setdefault(feed_forward.part, _Parts())
        # Of an expert's tokens, those that one rank has sent come first, then the same ones from the next.
        once = len(x) // feed_forward.copies
        into.inputs.append(x[:once].detach().cpu())
        into.active.append(packed(active[:once].bool()).cpu())

    with model.changed_by_inputs(keep):
        cross_entropy = cross_entropy_of(model.language_model, windows, what)
    channels = {each.part: each.neurons for each in model.feed_forwards}
    found = {
        part: Activity(torch.cat(each.inputs), torch.cat(each.active), channels[part])
        for part, each in parts.items()
    }
    return found, cross_entropy


def _check_memory(model: NeuronModel, tokens: int) -> None:
    """Of every feed-forward, as if all tokens were sent to every expert: what is there is then enough."""
    taken, free = 0, memory_free()
    for each in model.feed_forwards:
        weight = getattr(each.down, "weight")  # noqa: B009  (torch's own __getattr__ has no type)
        taken += tokens * (each.width * weight.element_size() + each.neurons // 8)
    if free is not None and 2 * taken > free:  # parts, then the whole of them
        raise PlatformError(
            f"recording {tokens} tokens of {len(model.feed_forwards)} feed-forwards takes up to "
            f"{2 * taken / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; give fewer --windows"
        )


@dataclass
class Hits:
    """How a predictor's neurons and those that were active met.

    Attributes:
        pairs: of a token and a neuron.
        active: of these, where the neuron was active.
        predicted: where it was expected to be.
        found: both.
    """

    pairs: float = 0
    active: float = 0
    predicted: float = 0
    found: float = 0

    def add(self, other: Hits, weight: float = 1.0) -> None:
        """Take in others, ``weight`` times."""
        self.pairs += weight * other.pairs
        self.active += weight * other.active
        self.predicted += weight * other.predicted
        self.found += weight * other.found

    @property
    def sparsity(self) -> float:
        """Share of pairs that were not active."""
        return 1 - self.active / self.pairs

    @property
    def predicted_sparsity(self) -> float:
        """Share of pairs that were expected not to be, and are not computed."""
        return 1 - self.predicted / self.pairs

    @property
    def recall(self) -> float:
        """Share of the active ones that were expected; 1 where none was active."""
        return self.found / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """Share of those expected that were active; 1 where none was expected."""
        return self.found / self.predicted if self.predicted else 1.0


class Predicted:
    """A :data:`~.neuron_model.ChangeByInput`: computes what predictors expect to be active, and nothing else.

    Args:
        predictors: by feed-forward; one that has none computes everything.
        cutoffs: of their logits, by feed-forward.

    Attributes:
        hits: by feed-forward, of the channels of this rank.
    """

    def __init__(self, predictors: Mapping[Part, Fitted], cutoffs: Mapping[Part, float]) -> None:
        self._predictors, self._cutoffs = predictors, cutoffs
        self.hits: dict[Part, Hits] = {}

    @torch.no_grad()
    def __call__(self, feed_forward: FeedForward, x: Tensor, inside: Tensor) -> Tensor | None:
        inside_NF = inside.reshape(-1, inside.shape[-1])
        active, part = inside_NF != 0, feed_forward.part
        if part in self._predictors:
            logits = feed_forward.own_channels(self._predictors[part].predictor(x))
            expected = logits >= self._cutoffs[part]
        else:
            expected = torch.ones_like(active)
        into = self.hits.setdefault(part, Hits())
        counts = (active.sum(), expected.sum(), (active & expected).sum())
        into.add(Hits(active.numel(), *map(float, counts)), 1 / feed_forward.copies)
        return inside.masked_fill(~expected.view_as(inside), 0)
