"""How evenly pipeline stages share the arithmetic, and the layout that shares it best. Without torch.

Under 1F1B every stage waits for the longest one, micro-batch after micro-batch; with virtual stages those
that the ranks pass through at the same time wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.planning.costs import layer_forward_flops, layers_per_stage, output_forward_flops


@dataclass(frozen=True)
class PipelineBalance:
    """Forward FLOPs of (virtual) pipeline stages, per token of text. A backward pass has twice as many."""

    stages: list[float]
    layout: list[int]
    """Layers of each stage in the layout whose longest stage is the shortest."""
    best: list[float]
    """FLOPs of each stage in that layout."""
    ranks: int
    """Of the pipeline; as many stages, one on each, are passed through at a time."""

    @property
    def shares(self) -> list[float]:
        """Of each stage, relative to the mean."""
        mean = sum(self.stages) / len(self.stages)
        return [stage / mean for stage in self.stages]

    @property
    def gain(self) -> float:
        """Share of a step's arithmetic that the best layout would save."""
        return 1 - self._waited_for(self.best) / self._waited_for(self.stages)

    def _waited_for(self, stages: Sequence[float]) -> float:
        """The longest of the stages that ranks pass through at a time, one after the other."""
        return sum(max(stages[first : first + self.ranks]) for first in range(0, len(stages), self.ranks))


def pipeline_balance(model: ModelConfig, parallel: ParallelConfig, seq_length: int) -> PipelineBalance:
    """Of a model that trains without a teacher.

    Args:
        model: the network.
        parallel: a topology that fits it.
        seq_length: tokens of text of a sequence.
    """
    work = [layer_forward_flops(model, layer, seq_length) for layer in layers(model)]
    output = output_forward_flops(model)
    ranks = parallel.pipeline_model_parallel_size
    best = balanced_layout(work, ranks * parallel.virtual_stages, output)

    def of_stages(layout: Sequence[int]) -> list[float]:
        ends = list(accumulate(layout))
        stages = [sum(work[end - number : end]) for number, end in zip(layout, ends, strict=True)]
        return [*stages[:-1], stages[-1] + output]

    return PipelineBalance(of_stages(layers_per_stage(model, parallel)), best, of_stages(best), ranks)


def balanced_layout(work: Sequence[float], stages: int, last: float) -> list[int]:
    """Layers of each stage such that the stage with most work has as little as can be.

    Args:
        work: of each layer, in order.
        stages: how many; at most as many as layers.
        last: work of the last stage beside its layers.
    """
    until = [0.0, *accumulate(work)]

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The least work of the longest of the last ``left`` stages, whose layers begin with ``first``."""
        if left == 1:
            return until[-1] - until[first] + last, (len(work) - first,)
        found = []
        for number in range(1, len(work) - first - left + 2):
            longest, rest = best(first + number, left - 1)
            found.append((max(until[first + number] - until[first], longest), (number, *rest)))
        return min(found)

    return list(best(0, stages)[1])
