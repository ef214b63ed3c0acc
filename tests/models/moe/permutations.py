"""Transformer Engine's order of tokens around experts, as its documentation says it, in plain torch.

Its map holds, for every token and expert, the row that the token's copy for that expert lies in: experts one
behind the other, the tokens of each in their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()


def _row_of(routing_map: Tensor) -> Tensor:
    """[tokens, experts] int64; -1 where a token does not go to an expert."""
    goes = routing_map.bool()
    rows = goes.t().flatten().cumsum(0).view(goes.shape[1], goes.shape[0]).t() - 1
    return torch.where(goes, rows, -1)


def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int) -> tuple[Tensor, Tensor]:
    """[num_out_tokens, hidden], and the map."""
    CALLS["moe_permute"] += 1
    return _copies(inp, _row_of(routing_map), num_out_tokens)


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[num_out_tokens, hidden], their probabilities [num_out_tokens], and the map."""
    CALLS["moe_permute_with_probs"] += 1
    rows = _row_of(routing_map)
    tokens, experts = (rows >= 0).nonzero(as_tuple=True)
    of_rows = probs.new_zeros(int(num_out_tokens)).index_add(0, rows[tokens, experts], probs[tokens, experts])
    return *_copies(inp, rows, num_out_tokens)[:1], of_rows, rows


def _copies(inp: Tensor, rows: Tensor, num_out_tokens: int) -> tuple[Tensor, Tensor]:
    tokens, experts = (rows >= 0).nonzero(as_tuple=True)
    assert len(tokens) == int(num_out_tokens) > 0
    out = inp.new_zeros(len(tokens), inp.shape[1])
    return out.index_add(0, rows[tokens, experts], inp[tokens]), rows


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
) -> Tensor:
    """[tokens, hidden]: the sum of each token's copies, in float32 at least."""
    CALLS["moe_unpermute"] += 1
    assert merging_probs is None and restore_shape is not None and inp.numel() > 0
    tokens, experts = (row_id_map >= 0).nonzero(as_tuple=True)
    wide = torch.promote_types(inp.dtype, torch.float32)
    sums = torch.zeros(restore_shape, dtype=wide)
    return sums.index_add(0, tokens, inp[row_id_map[tokens, experts]].to(wide)).to(inp.dtype)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """The same rows, chunk by chunk in another order."""
    return moe_sort_chunks_by_index_with_probs(inp, None, split_sizes, sorted_index)[0]


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor | None, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """As :func:`moe_sort_chunks_by_index`, with the probability of each row."""
    CALLS["moe_sort_chunks_by_index"] += 1
    assert split_sizes.dim() == sorted_index.dim() == 1 and len(split_sizes) == len(sorted_index)
    rows = torch.arange(len(inp)).split(split_sizes.tolist())
    order = torch.cat([rows[each] for each in sorted_index.tolist()])
    return inp[order], None if probs is None else probs[order]


@contextmanager
def installed() -> Iterator[Counter[str]]:
    """megatron-core has found them; what it calls is counted."""
    from megatron.core.transformer.moe import moe_utils

    functions = (
        moe_permute,
        moe_permute_with_probs,
        moe_unpermute,
        moe_sort_chunks_by_index,
        moe_sort_chunks_by_index_with_probs,
    )
    names = {f"fused_{each.__name__.removeprefix('moe_')}": each for each in functions}

    CALLS.clear()
    with mock.patch.multiple(moe_utils, HAVE_TE=True, create=True, **names):
        yield CALLS
