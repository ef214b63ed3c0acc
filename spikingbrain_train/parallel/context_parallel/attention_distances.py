"""How far softmax attention looks back, in chunks of queries and on keys of all context-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.parallel.context_parallel.communication import all_slices

_CHUNK_ELEMENTS = 1 << 24
"""Scores that exist at a time: 64 MiB in float32."""


@torch.no_grad()
def attention_distances(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    *,
    window: int | None,
    layout: SequenceLayout,
    cp_group: ProcessGroup,
    scale: float,
) -> Tensor:
    """Sums over this rank's queries of the mean distance to the keys that they attend to.

    A document's first token is left out: heads that have nothing to look for rest on it, wherever it is
    (arXiv 2309.17453), and it would count as a long memory. Queries that see nothing else count 0.

    Args:
        q_BTHK: rotated queries of this rank's slice.
        k_BTGK: rotated keys of this rank's slice, H // G heads a group.
        window: keys that a query sees, its own included; None for all before it.
        layout: how the sequences lie on context-parallel ranks, and their documents; sinks are padding.
        cp_group: context-parallel ranks.
        scale: factor of the scores.

    Returns:
        [H] float64, in tokens.
    """
    assert layout.num_sink_tokens == 0 or layout.sinks_are_padding, "distances are measured without sinks"
    q_BTHK = q_BTHK[:, layout.local_sink_tokens :]
    B, T, H, K = q_BTHK.shape
    keys = all_slices(k_BTGK, cp_group)[:, layout.num_sink_tokens :].float()
    S, G = keys.shape[1:3]
    first = layout.text_range().start
    position_S = torch.arange(S, device=q_BTHK.device)
    start_BS = torch.tensor([_document_starts(layout, row) for row in range(B)], device=q_BTHK.device)
    sums = torch.zeros(H, dtype=torch.float64, device=q_BTHK.device)
    chunk = max(1, _CHUNK_ELEMENTS // (B * H * S))
    for begin in range(0, T, chunk):
        q = q_BTHK[:, begin : begin + chunk].float()
        C = q.shape[1]
        position_C = torch.arange(first + begin, first + begin + C, device=q.device)
        distance_CS = position_C[:, None] - position_S
        start_BC = start_BS[:, first + begin : first + begin + C]
        seen_BCS = (distance_CS >= 0) & (position_S >= start_BC[..., None])
        if window is not None:
            seen_BCS &= distance_CS < window
        scores_BGRCS = torch.einsum("bcgrk,bsgk->bgrcs", q.view(B, C, G, H // G, K), keys) * scale
        seen_B11CS = seen_BCS[:, None, None]
        scores_BGRCS.masked_fill_(~seen_B11CS, float("-inf"))
        weights_BGRCS = scores_BGRCS.softmax(-1)
        weights_BGRCS.masked_fill_((position_S == start_BC[..., None])[:, None, None], 0.0)
        total_BGRC = weights_BGRCS.sum(-1)
        mean_BGRC = (weights_BGRCS * distance_CS).sum(-1) / total_BGRC.clamp_min(1e-9)
        sums += mean_BGRC.double().sum((0, 3)).flatten()
    return sums


def _document_starts(layout: SequenceLayout, row: int) -> list[int]:
    """For every token of a row's text, where its document begins."""
    bounds = layout.bounds(row)
    return [start for start, end in zip(bounds, bounds[1:], strict=False) for _ in range(start, end)]
