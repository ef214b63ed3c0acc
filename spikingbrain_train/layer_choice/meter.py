"""How far a model with some swapped layers is from its dense source, by forward passes alone.

Layers are taken from two models, one whose layers all stay and one whose candidates are all swapped. What
lies in front of the first swapped layer is the same for many models: the hidden states there are kept, one
set of them, and move on with the layer that is looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.layer_choice.measurements import Measurement
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.models.output_head import gather_hidden_states, vocab_parallel_linear_cross_entropy
from spikingbrain_train.ops.linear_cross_entropy import Distillation
from spikingbrain_train.parallel.process_groups import ProcessGroups


class SwapMeter:
    """Measures on micro-batches that stay in memory; every rank calls it together.

    Args:
        teacher: the dense source.
        kept: the same with the mixer of layers that stay, everywhere.
        swapped: the same with the other mixer in every candidate, and the sinks if there are any.
        batches: this rank's held-out micro-batches.
        groups: process groups, of one pipeline stage.
    """

    def __init__(
        self,
        teacher: HybridGPTModel,
        kept: HybridGPTModel,
        swapped: HybridGPTModel,
        batches: Sequence[MicroBatch],
        groups: ProcessGroups,
    ) -> None:
        self.teacher, self.kept, self.swapped = teacher, kept, swapped
        self.batches = batches
        self.groups = groups
        self.layers_run = 0
        """Layers that micro-batches went through so far; a pass of one is as many as the model has."""
        self._base: frozenset[int] = frozenset()
        self._depth = 0
        self._held: list[Tensor] = []
        self._targets: list[Tensor] = []

    @torch.no_grad()
    def measure_source(self) -> float:
        """Cross entropy of the dense source, whose final hidden states are kept for the others."""
        self._targets = []
        for batch in self.batches:
            layout = batch.layout.without_sinks()
            hidden = self.teacher(batch.tokens, layout=layout, return_hidden_states=True)
            self._targets.append(hidden)
        return self._losses(self._targets)[1]

    @torch.no_grad()
    def hold(self, base: Collection[int], layer: int) -> None:
        """Keep the hidden states in front of ``layer`` of a model whose layers ``base`` are swapped."""
        base = frozenset(base)
        if not self._held or self._depth > layer or not _agree(base, self._base, self._depth):
            self._held = [self.swapped.embed(batch.tokens, batch.layout) for batch in self.batches]
            self._depth = 0
        self._base = base
        self._held = [
            self._through(hidden, batch, base, self._depth, layer)
            for hidden, batch in zip(self._held, self.batches, strict=True)
        ]
        self._depth = layer

    @torch.no_grad()
    def measure(self, swapped: Collection[int]) -> Measurement:
        """The model whose layers ``swapped`` are swapped; what :meth:`hold` has prepared is not run again."""
        if not self._targets:
            self.measure_source()
        layers = frozenset(swapped)
        if not self._held or not _agree(layers, self._base, self._depth):
            self.hold(layers, 0)
        final = (
            self._finish(self._through(hidden, batch, layers, self._depth, len(self.kept.decoder.layers)))
            for hidden, batch in zip(self._held, self.batches, strict=True)
        )
        kl_divergence, cross_entropy = self._losses(final)
        return Measurement(tuple(sorted(layers)), kl_divergence, cross_entropy)

    def _through(
        self, hidden: Tensor, batch: MicroBatch, swapped: Collection[int], first: int, last: int
    ) -> Tensor:
        for at in range(first, last):
            model = self.swapped if at in swapped else self.kept
            hidden, _ = model.decoder.layers[at](
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=model.rotary_pos_emb(batch.layout),
                packed_seq_params=batch.layout,
            )
            self.layers_run += 1
        return hidden

    def _finish(self, hidden: Tensor) -> Tensor:
        return self.teacher.decoder.final_layernorm(hidden)

    def _losses(self, final: Iterable[Tensor]) -> tuple[float, float]:
        """KL divergence and cross entropy, means over the tokens of all ranks."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        weight = self.teacher.output_weight()
        for hidden, target, batch in zip(final, self._targets, self.batches, strict=True):
            split = {
                "num_sink_tokens": batch.layout.local_sink_tokens,
                "sequence_parallel": self.teacher.config.sequence_parallel,
                "tp_group": self.groups.collection.tp,
            }
            _, losses = vocab_parallel_linear_cross_entropy(
                hidden,
                weight,
                batch.labels,
                batch.loss_mask,
                vocab_size=self.teacher.model_config.vocab_size,
                **split,
                distillation=Distillation(gather_hidden_states(target, **split), weight, weight=1.0),
            )
            assert losses.kl_divergence is not None  # a distillation has one
            mask = batch.loss_mask.flatten().double()
            sums += torch.stack(
                [
                    (losses.kl_divergence.double() * mask).sum(),
                    (losses.cross_entropy.double() * mask).sum(),
                    mask.sum(),
                ]
            )
        torch.distributed.all_reduce(sums, group=self.groups.collection.dp_cp)
        kl_divergence, cross_entropy, tokens = sums.tolist()
        return kl_divergence / tokens, cross_entropy / tokens


def _agree(one: Collection[int], other: Collection[int], depth: int) -> bool:
    """Whether the first ``depth`` layers of two models are the same."""
    return {at for at in one if at < depth} == {at for at in other if at < depth}
