"""Which neurons an ability rests on, and what a model is without them.

Abilities are labels of texts (configurable foundation models, arXiv 2409.02877). Of each window of text a
neuron has one number, the mean norm of its output; how well that number tells windows of an ability from all
others is the neuron's score for it: the average precision with which windows in falling order of the number
find the ability (Suau et al., arXiv 2005.07647). The number is a mean of norms because activations of gated
feed-forwards have either sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikingbrain_train.activation_sparsity.gate_records import Part
from spikingbrain_train.bricks.neuron_model import Change, FeedForward, NeuronModel
from spikingbrain_train.evaluation.text_windows import cross_entropy_of

Name = tuple[int, str]
"""A feed-forward: its layer, and its name in that."""
_CHANNELS_AT_ONCE = 4096
_SEED = 0


@dataclass
class WindowRecords:
    """Of every feed-forward, one row a window: mean output norms of its channels."""

    rows: dict[Part, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def watch(self, feed_forward: FeedForward, inside: Tensor) -> None:
        """A :data:`~.neuron_model.Change` that counts and changes nothing; one call is one window."""
        norms = feed_forward.output_norms(inside).reshape(-1, inside.shape[-1])
        self.rows.setdefault(feed_forward.part, []).append(norms.sum(0) / max(len(norms), 1))


def average_precision(values: Tensor, is_positive: Tensor) -> Tensor:
    """How early positives come when windows are taken in falling order, neuron by neuron.

    Args:
        values: [windows, F].
        is_positive: [windows] bool.

    Returns:
        [F] float64: mean over the positives of the share of positives among those up to it; 1 where all
        positives come first.
    """
    found = []
    places = torch.arange(1, len(values) + 1, dtype=torch.float64).unsqueeze(1)
    for part in values.split(_CHANNELS_AT_ONCE, dim=1):
        order = part.argsort(dim=0, descending=True, stable=True)
        hits = is_positive[order].double()
        found.append((hits.cumsum(0) / places * hits).sum(0) / is_positive.sum())
    return torch.cat(found)


def scores_of(rows: Mapping[str, Mapping[Name, Tensor]]) -> dict[str, dict[Name, Tensor]]:
    """Of each ability the score of every neuron.

    Where several neurons tell an ability apart equally well, which happens with few windows, the one goes
    first whose mean on it lies further above that on the others, in standard deviations over all windows.

    Args:
        rows: ability -> feed-forward -> [windows, F] mean output norms.

    Returns:
        Ability -> feed-forward -> [F] float64.
    """
    found: dict[str, dict[Name, Tensor]] = {ability: {} for ability in rows}
    for name in next(iter(rows.values())):
        values = torch.cat([each[name] for each in rows.values()]).double()
        labels = torch.cat(
            [torch.full((len(each[name]),), index) for index, each in enumerate(rows.values())]
        )
        for index, ability in enumerate(rows):
            own = labels == index
            spread = values.std(0).clamp_min(1e-12)
            gap = (values[own].mean(0) - values[~own].mean(0)) / spread
            found[ability][name] = average_precision(values, own) + 1e-3 * torch.tanh(gap)
    return found


def top_neurons(scores: Mapping[Name, Tensor], share: float) -> dict[Name, Tensor]:
    """The highest ``share`` of every feed-forward's neurons.

    Args:
        scores: feed-forward -> [F].
        share: 0 to 1.

    Returns:
        Feed-forward -> [F] bool.
    """
    chosen = {}
    for name, score in scores.items():
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[score.topk(round(share * len(score))).indices] = True
        chosen[name] = mask
    return chosen


def without(neurons: Mapping[Name, Tensor]) -> Change:
    """Leave neurons out, at every token.

    Args:
        neurons: feed-forward -> [F] bool, those to leave out; over all channels.
    """

    def change(feed_forward: FeedForward, inside: Tensor) -> Tensor:
        mask, width = neurons[feed_forward.part.layer, feed_forward.part.name], inside.shape[-1]
        first = feed_forward.part.shard[0] * width if feed_forward.part.shard else 0
        return inside.masked_fill(mask[first : first + width].to(inside.device), 0)

    return change


@dataclass(frozen=True)
class Abilities:
    """What was measured; tables are over the abilities in their order."""

    names: Sequence[str]
    share: float
    """Of all neurons, that each ability's are."""
    whole: Sequence[float]
    """Cross entropy of each text, read with all neurons, nats per token."""
    pruned: Sequence[Sequence[float]]
    """Row: whose neurons are left out; column: whose text is read."""
    random: Sequence[float]
    """The same with as many neurons left out that were drawn at random."""
    overlap: Sequence[Sequence[float]]
    """Jaccard index of the neurons of two abilities."""
    neurons: int
    """Of the whole model."""
    resident: int
    """That are among the most active of every ability."""

    @property
    def damage(self) -> list[list[float]]:
        """Nats per token more than the whole model."""
        return [[value - of for value, of in zip(row, self.whole, strict=True)] for row in self.pruned]

    @property
    def own_hit_worst(self) -> int:
        """Rows whose largest damage is that of the own ability."""
        return sum(row.index(max(row)) == index for index, row in enumerate(self.damage))


def measure_abilities(
    model: NeuronModel,
    texts: Mapping[str, tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]],
    share: float,
) -> tuple[Abilities, dict[str, dict[Name, Tensor]]]:
    """Score all neurons on one half of every text, and read the other halves without each ability's.

    On several ranks, which read every window together, all call it.

    Args:
        model: any form.
        texts: ability -> windows to score neurons on, windows to read; of one length.
        share: of every feed-forward's neurons, that are an ability's.

    Returns:
        What was measured, and ability -> feed-forward -> [F] bool, over all ranks.
    """
    names, rows = list(texts), {}
    for name, (windows, _) in texts.items():
        records = WindowRecords()
        with model.changed(records.watch):
            cross_entropy_of(model.language_model, windows, f"scoring neurons for {name}")
        rows[name] = _of_all_ranks(model, records)
    chosen = {name: top_neurons(each, share) for name, each in scores_of(rows).items()}
    means = [{name: each.mean(0) for name, each in of_one.items()} for of_one in rows.values()]
    busiest = [top_neurons(each, share) for each in means]

    def read(what: str) -> list[float]:
        return [
            cross_entropy_of(model.language_model, windows, f"reading {name}{what}")
            for name, (_, windows) in texts.items()
        ]

    whole, pruned = read(""), []
    for name in names:
        with model.changed(without(chosen[name])):
            pruned.append(read(f" without {name}"))
    with model.changed(without(_drawn_at_random(chosen[names[0]]))):
        random = read(" without random neurons")
    masks = torch.stack([torch.cat(list(chosen[name].values())) for name in names])
    resident = torch.stack([torch.cat(list(each.values())) for each in busiest]).all(0)
    overlap = [[float((a & b).sum() / (a | b).sum().clamp_min(1)) for b in masks] for a in masks]
    found = Abilities(names, share, whole, pruned, random, overlap, masks.shape[1], int(resident.sum()))
    return found, chosen


def _of_all_ranks(model: NeuronModel, records: WindowRecords) -> dict[Name, Tensor]:
    """Feed-forward -> [windows, F] on the CPU, shares of ranks beside one another."""
    mine = {part: torch.stack(each).cpu() for part, each in records.rows.items()}
    parts = {part: each for rank in model.gathered(mine) for part, each in rank.items()}
    found: dict[Name, list[Tensor]] = {}
    for part in sorted(parts):
        found.setdefault((part.layer, part.name), []).append(parts[part])
    return {name: torch.cat(each, 1) for name, each in found.items()}


def _drawn_at_random(like: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    return {name: mask[torch.randperm(len(mask), generator=generator)] for name, mask in like.items()}
