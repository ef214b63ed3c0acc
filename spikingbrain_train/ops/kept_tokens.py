"""The few tokens that stand for a teacher's distribution: its likeliest ones, and some drawn from the rest.

The likeliest ``top`` tokens keep their probabilities. What lies below them, the tail, has much of the mass (9
% below 64 tokens of SmolLM2-135M on documentation) and more of the KL divergence: leaving it out, or summing
it up as one event, which only bounds the divergence from below, biases the loss. So ``drawn`` tokens are
drawn from the tail by systematic sampling, each of which stands for the same share of its mass, and sums over
the vocabulary stay unbiased (Anshumann et al., arXiv 2503.16870, draw all tokens so).

Shape letters: N tokens, D hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 25
_LOWEST = -1e4


@dataclass(frozen=True)
class VocabularyShare:
    """This rank's rows of the vocabulary, and how to ask the ranks that have the rest."""

    start: int = 0
    """Index of its first row in the whole vocabulary."""
    rank: int = 0
    """Of this rank among those that share it."""
    gather: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(0)
    """From a tensor to those of all ranks, [ranks, ...], in their order."""


def kept_tokens(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    top: int,
    drawn: int,
    temperature: float = 1.0,
    share: VocabularyShare | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each distribution ``softmax(hidden @ weight.T / temperature)`` the tokens that stand for it.

    Args:
        hidden: [N, D] final hidden states.
        weight: [V, D] output projection: this rank's rows, padding rows left out. V may be 0.
        offsets: [N] in [0, 1), what the draws depend on.
        top: likeliest tokens, at most the whole vocabulary.
        drawn: tokens drawn among the others.
        temperature: divides the logits.
        share: this rank's part of the vocabulary; None where it has all of it.

    Returns:
        ids [N, top + drawn] int64, indices into the whole vocabulary, the likeliest ones first; their log
        probabilities, [N, top + drawn] float32; and the tail's probability, [N] float32. The same on every
        rank.
    """
    share = share or VocabularyShare()
    rows = max(1, _CHUNK_ELEMENTS // max(len(weight), 1))
    parts = []
    for first in range(0, len(hidden), rows):
        chunk = slice(first, first + rows)
        logits = (hidden[chunk] @ weight.t()).float().div_(temperature)
        if len(weight) == 0:
            logits = logits.new_full((len(logits), 1), float("-inf"))
        parts.append(_kept(logits, offsets[chunk], top, drawn, share))
    ids, log_probabilities, tail = (torch.cat(each) for each in zip(*parts, strict=True))
    return ids, log_probabilities, tail


def _kept(
    logits: Tensor, offsets: Tensor, top: int, drawn: int, share: VocabularyShare
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`kept_tokens` of logits [n, V], which are overwritten."""
    largest = share.gather(logits.amax(1)).amax(0)
    scores = logits.sub_(largest[:, None])
    normaliser = share.gather(scores.exp().sum(1)).sum(0)
    log_probabilities = scores.sub_(normaliser.log()[:, None])

    values, columns = log_probabilities.topk(min(top, log_probabilities.shape[1]), dim=1)
    missing = top - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=float("-inf"))
    ids = torch.nn.functional.pad(columns + share.start, (0, missing))
    values, ids = (torch.cat(list(share.gather(each)), dim=1) for each in (values, ids))
    values, order = values.topk(top, dim=1)
    ids = ids.gather(1, order)

    probabilities = log_probabilities.exp()
    here = (ids >= share.start) & (ids < share.start + logits.shape[1]) & values.isfinite()
    column = (ids - share.start).clamp_(0, logits.shape[1] - 1)
    keep = torch.ones_like(probabilities).scatter_reduce_(1, column, 1.0 - here.float(), "prod")
    cumulative = probabilities.mul_(keep).cumsum(1)
    masses = share.gather(cumulative[:, -1])  # [ranks, n]
    until = masses.cumsum(0)
    tail = until[-1]

    steps = torch.arange(drawn, device=logits.device, dtype=logits.dtype)
    points = (steps + offsets[:, None].to(logits.dtype)) / drawn * tail[:, None]
    owner = (points[None] >= until[:, :, None]).sum(0).clamp_(max=len(masses) - 1)
    before = until[share.rank] - masses[share.rank]
    mine = torch.searchsorted(cumulative, (points - before[:, None]).clamp_(min=0).contiguous(), right=True)
    mine.clamp_(max=logits.shape[1] - 1)
    of_draws = share.gather(log_probabilities.gather(1, mine))
    draws = share.gather(mine + share.start)
    return (
        torch.cat((ids, draws.gather(0, owner[None])[0]), dim=1),
        # An id of no weight may be one of padding: its logarithm has to be a number, too.
        torch.cat((values, of_draws.gather(0, owner[None])[0]), dim=1).clamp_(min=_LOWEST),
        tail,
    )
