"""Causal sliding-window attention on CPU: O(T * window) work, O(T) memory, no T x T mask.

Queries are taken in tiles; a tile meets the keys of its windows in one matrix product, and the heads of a
group are rows of it, so keys and values are never repeated. Only the two corners of the product that the
window cuts are masked. Sinks are more columns of every tile. The backward pass recomputes the probabilities
from the saved log-sum-exp.

CPU matrix products of bfloat16 operands return bfloat16, too coarse for scores that are exponentiated. So
what is subtracted from a score (the row's maximum, its log-sum-exp, or its share of ``sum(o * grad_o)``)
rides inside the product as two more columns, against two columns of ones: the difference is formed in float32
and what counts, the probabilities that are not small, is rounded where it is close to zero. That also saves a
pass over the scores.

Shape legend: B batch, T queries, H query heads, G groups, R = H // G, K key dim, V value dim; C queries of a
tile, S keys that a tile may see; U keys in all, with padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikingbrain_train.ops.softmax_attention.torch_sdpa import sdpa_softmax_attention

# Rows of one product (heads of a group times queries of a tile): enough for full speed, small for the caches.
_TILE_ROWS = 768
_ALIGNMENT = 16
# A row's maximum is guessed from this many keys before its tile, those of the tile, and the first few of the
# sequence, which often receive most of the attention.
_PROBED_KEYS_BEFORE = 64
_PROBED_FIRST_KEYS = 16
# A guess that is too low by more than log(this) would cost bfloat16 digits: then the true maximum is
# computed.
_MAX_UNNORMALISED_SUM = 1e4


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class _KeyLayout:
    """Where things lie among the padded keys: sinks, padding that nobody sees, text, zeros.

    The padding puts the key at which the first query stands on a multiple of _ALIGNMENT; so tiles of queries
    and their keys are aligned alike.
    """

    num_sink_tokens: int
    text_start: int
    """First key of text."""
    first_query: int
    """Key at which the first query stands."""
    text_stop: int
    window: int

    @classmethod
    def of(cls, Tq: int, Tk: int, window: int, num_sink_tokens: int) -> _KeyLayout:
        first_query = _aligned(num_sink_tokens + Tk - Tq)
        return cls(num_sink_tokens, first_query + Tq - Tk, first_query, first_query + Tq, min(window, Tk))

    def padded(self, x_BSGD: Tensor, length: int, extra_columns: int = 0) -> Tensor:
        """x in this layout, as new zeros [B, G, length, D + extra_columns] around it."""
        B, _, G, D = x_BSGD.shape
        out = x_BSGD.new_zeros(B, G, length, D + extra_columns)
        x = x_BSGD.transpose(1, 2)
        out[:, :, : self.num_sink_tokens, :D] = x[:, :, : self.num_sink_tokens]
        out[:, :, self.text_start : self.text_stop, :D] = x[:, :, self.num_sink_tokens :]
        return out

    def without_padding(self, x_BGDU: Tensor) -> Tensor:
        """The inverse for what has the keys last: [B, S, G, D]."""
        text = x_BGDU[..., self.text_start : self.text_stop]
        if self.num_sink_tokens:
            text = torch.cat((x_BGDU[..., : self.num_sink_tokens], text), dim=-1)
        return text.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Tile:
    """Which queries and keys one product is about."""

    batch: int
    group: int
    queries: slice
    keys: slice
    sink_columns: int
    """Columns in front of ``keys`` for the first keys of all; 0 where ``keys`` begin with them."""
    layout: _KeyLayout

    @property
    def num_columns(self) -> int:
        """S, the keys of the tile."""
        return self.sink_columns + self.keys.stop - self.keys.start

    def columns(self, x_BGUD: Tensor) -> Tensor:
        """The tile's keys [S, D] of a padded tensor."""
        x = x_BGUD[self.batch, self.group]
        if self.sink_columns == 0:
            return x[self.keys]
        return torch.cat((x[: self.sink_columns], x[self.keys]))

    def add_columns_(self, total_BGDU: Tensor, x_DS: Tensor) -> None:
        """Add what :meth:`columns` contributed."""
        total = total_BGDU[self.batch, self.group]
        if self.sink_columns:
            total[:, : self.sink_columns] += x_DS[:, : self.sink_columns]
        total[:, self.keys] += x_DS[:, self.sink_columns :]

    def mask_(self, scores_RCS: Tensor, value: float) -> Tensor:
        """Overwrite what lies outside the windows and is no sink.

        That is what comes after the query, or ``window`` or more before it.
        """
        C = self.queries.stop - self.queries.start
        layout, first_key = self.layout, self.keys.start
        corner = scores_RCS[..., -C:]
        # The first text key in sight of row 0 and the one that the tile's columns of text begin with.
        first_visible = layout.first_query + self.queries.start - layout.window + 1
        text = max(layout.text_start, first_key)
        left_start = self.sink_columns + text - first_key
        left = slice(left_start, left_start + max(0, first_visible + C - 1 - text))
        if self.sink_columns:
            padding = slice(layout.num_sink_tokens, self.sink_columns)
        else:
            padding = slice(max(0, layout.num_sink_tokens - first_key), max(0, layout.text_start - first_key))
        if value == 0.0:
            corner.tril_()
            if left.start < left.stop:
                scores_RCS[..., left].triu_(first_visible - text)
            scores_RCS[..., padding].zero_()
        else:
            visible = torch.ones(C, scores_RCS.shape[-1], dtype=torch.bool, device=scores_RCS.device)
            visible[:, -C:].tril_()
            visible[:, left].triu_(first_visible - text)
            visible[:, padding] = False
            # One sum for all heads: filling where a mask says so is not vectorised on CPU.
            scores_RCS += torch.zeros_like(visible, dtype=scores_RCS.dtype).masked_fill_(~visible, value)
        return scores_RCS


def _tiles(B: int, G: int, padded_T: int, tile: int, layout: _KeyLayout) -> Iterator[_Tile]:
    sink_columns = _aligned(layout.num_sink_tokens)
    for batch in range(B):
        for group in range(G):
            for start in range(0, padded_T, tile):
                queries = slice(start, min(start + tile, padded_T))
                last = layout.first_query + queries.stop
                first = max(0, layout.first_query + start - layout.window + 1) // _ALIGNMENT * _ALIGNMENT
                if first > sink_columns:
                    yield _Tile(batch, group, queries, slice(first, last), sink_columns, layout)
                else:
                    yield _Tile(batch, group, queries, slice(0 if sink_columns else first, last), 0, layout)


def _tile_length(R: int, T: int) -> int:
    """Queries of a tile, a power of two so that tiles stay aligned."""
    length = 1 << (max(1, _TILE_ROWS // R).bit_length() - 1)
    return max(_ALIGNMENT, min(length, 256, 1 << (T - 1).bit_length()))


def _subtract_in_product_(rows: Tensor, amount: Tensor) -> Tensor:
    """Set the last two columns of rows so that a product with two columns of ones loses ``amount``.

    ``amount`` is float32: its high and low part go into a column each.
    """
    high = amount.to(rows.dtype)
    rows[..., -2] = high.neg()
    rows[..., -1] = (high.to(amount.dtype) - amount).to(rows.dtype)
    return rows


class _Sequences:
    """Inputs of one call, laid out for the products.

    k and v have two columns of ones, and everything is padded to tiles.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, num_sink_tokens: int
    ) -> None:
        self.B, self.T, self.H, self.K = q.shape
        self.G, self.V = v.shape[2:]
        self.R = self.H // self.G
        self.dtype = q.dtype
        self.sum_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.scale = scale
        # torch's exp2 takes half the time of its exp in float32. In bfloat16 it saves less, and queries would
        # lose digits that a scale of, say, 1/8 leaves as they are.
        self.is_base_2 = q.dtype != torch.bfloat16
        self.layout = _KeyLayout.of(self.T, k.shape[1] - num_sink_tokens, window, num_sink_tokens)
        tile = _tile_length(self.R, self.T)
        padded_T = _aligned(self.T)
        self.padded_keys = self.layout.first_query + padded_T
        self.q = q.unflatten(2, (self.G, self.R))
        self.k, self.k_and_ones = self._with_and_without_ones(k)
        self.v, self.v_and_ones = self._with_and_without_ones(v)
        self.tiles = list(_tiles(self.B, self.G, padded_T, tile, self.layout))
        self.scratch = q.new_empty(self.R * tile * max(t.num_columns for t in self.tiles))

    def _with_and_without_ones(self, x_BSGD: Tensor) -> tuple[Tensor, Tensor]:
        """x as contiguous [B, G, U, D], without and with two more columns of ones."""
        with_ones = self.layout.padded(x_BSGD, self.padded_keys, extra_columns=2)
        with_ones[..., -2:] = 1.0
        return with_ones[..., :-2].contiguous(), with_ones

    def rows(self, x_BTGRD: Tensor, tile: _Tile, factor: float | None = None) -> Tensor:
        """Queries of a tile (times factor) as [R, C, D + 2], the last two columns zero, padding zero."""
        x = x_BTGRD[tile.batch, tile.queries, tile.group].transpose(0, 1)
        out = x.new_zeros(self.R, tile.queries.stop - tile.queries.start, x.shape[-1] + 2)
        target = out[:, : x.shape[1], :-2]
        if factor is None:
            target.copy_(x)
        else:
            torch.mul(x, factor, out=target)
        return out

    def scaled_queries(self, tile: _Tile) -> Tensor:
        """Queries of a tile as :meth:`rows`, whose scores are exponents of :meth:`power_`."""
        return self.rows(self.q, tile, self.scale * (math.log2(math.e) if self.is_base_2 else 1.0))

    def power_(self, scores: Tensor) -> Tensor:
        """e to the power of scaled scores, in place: what they are exponents of."""
        return scores.exp2_() if self.is_base_2 else scores.exp_()

    def logarithm(self, sums: Tensor) -> Tensor:
        """The inverse."""
        return sums.log2() if self.is_base_2 else sums.log()

    def row_values(self, x_BTGR: Tensor, tile: _Tile) -> Tensor:
        """One number a query of a tile, [R, C], zero for padding."""
        x = x_BTGR[tile.batch, tile.queries, tile.group].transpose(0, 1)
        return F.pad(x, (0, tile.queries.stop - tile.queries.start - x.shape[1]))

    @staticmethod
    def write(target_BTGRx: Tensor, tile: _Tile, x_RCx: Tensor) -> None:
        """Put rows of a tile back, without the padding."""
        target = target_BTGRx[tile.batch, tile.queries, tile.group]
        target.copy_(x_RCx.transpose(0, 1)[: target.shape[0]])


def _products(rows_RCD: Tensor, columns_SD: Tensor, scratch: Tensor) -> Tensor:
    """[R, C, D] x [S, D] -> [R, C, S] at the start of ``scratch``.

    New memory for every tile would cost page faults.
    """
    R, C, _ = rows_RCD.shape
    out = scratch[: R * C * len(columns_SD)].view(R * C, -1)
    return torch.mm(rows_RCD.flatten(0, 1), columns_SD.t(), out=out).view(R, C, -1)


def _row_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the last dimension in ``dtype``.

    Partial sums in x's own dtype are much faster, and their errors average out.
    """
    S = x.shape[-1]
    return x.unflatten(-1, (S // _ALIGNMENT, _ALIGNMENT)).sum(-2).sum(-1, dtype=dtype)


def _guess_maximum(sequences: _Sequences, tile: _Tile, q_RCK: Tensor) -> Tensor:
    """A cheap lower bound of each row's largest score, usually close: of the nearest and first keys."""
    layout, scratch = tile.layout, sequences.scratch
    standing, stop = layout.first_query + tile.queries.start, tile.keys.stop
    near_keys = slice(max(tile.keys.start, standing - _PROBED_KEYS_BEFORE), stop)
    near = replace(tile, keys=near_keys, sink_columns=0)
    guess = near.mask_(_products(q_RCK, near.columns(sequences.k_and_ones), scratch), float("-inf")).amax(-1)
    probed = None
    if layout.num_sink_tokens:
        probed = slice(0, min(layout.num_sink_tokens, _PROBED_FIRST_KEYS))
    elif standing - _PROBED_FIRST_KEYS >= layout.text_start >= stop - layout.window:
        probed = slice(layout.text_start, layout.text_start + _PROBED_FIRST_KEYS)
    if probed is not None:
        k = sequences.k_and_ones[tile.batch, tile.group, probed]
        guess = torch.maximum(guess, _products(q_RCK, k, scratch).amax(-1))
    return guess.to(sequences.sum_dtype)


def _tile_forward(sequences: _Sequences, tile: _Tile) -> tuple[Tensor, Tensor]:
    """Output [R, C, V] and log-sum-exp [R, C] of one tile, the latter in units of its scores."""
    q = sequences.scaled_queries(tile)
    k, v = tile.columns(sequences.k_and_ones), tile.columns(sequences.v)
    maximum = _guess_maximum(sequences, tile, q)

    def unnormalised() -> tuple[Tensor, Tensor]:
        scores = _products(_subtract_in_product_(q, maximum), k, sequences.scratch)
        p = tile.mask_(sequences.power_(scores), 0.0)
        return p, _row_sums(p, sequences.sum_dtype)

    p, sums = unnormalised()
    if not sums.max().item() <= _MAX_UNNORMALISED_SUM + len(k):
        scores = tile.mask_(_products(q, k, sequences.scratch), float("-inf"))
        maximum = maximum + scores.amax(-1).to(maximum.dtype)
        p, sums = unnormalised()
    o = torch.mm(p.flatten(0, 1), v).view(*p.shape[:2], -1)
    return o / sums.unsqueeze(-1), maximum + sequences.logarithm(sums)


class _BlockedSlidingWindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, num_sink_tokens: int
    ) -> Tensor:
        sequences = _Sequences(q, k, v, window, scale, num_sink_tokens)
        B, T, H, _ = q.shape
        o = q.new_empty(B, T, sequences.G, sequences.R, sequences.V)
        log_sum_exp = q.new_empty(B, T, sequences.G, sequences.R, dtype=sequences.sum_dtype)
        for tile in sequences.tiles:
            o_tile, log_sum_exp_tile = _tile_forward(sequences, tile)
            sequences.write(o, tile, o_tile)
            sequences.write(log_sum_exp, tile, log_sum_exp_tile)
        o = o.view(B, T, H, -1)
        ctx.save_for_backward(q, k, v, o, log_sum_exp)
        ctx.settings = (window, scale, num_sink_tokens)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, log_sum_exp = ctx.saved_tensors
        sequences = _Sequences(q, k, v, *ctx.settings)
        B, T, G, R = sequences.B, sequences.T, sequences.G, sequences.R
        # What the softmax subtracts from every gradient of a row's probabilities.
        means = (grad_o * o).sum(-1, dtype=sequences.sum_dtype).view(B, T, G, R)
        grad_o = grad_o.unflatten(2, (G, R))
        grad_q = q.new_empty(B, T, G, R, sequences.K)
        # Transposed, so that the products that fill them need no transposed copy of the scores.
        grad_k = q.new_zeros(B, G, sequences.K, sequences.padded_keys, dtype=sequences.sum_dtype)
        grad_v = q.new_zeros(B, G, sequences.V, sequences.padded_keys, dtype=sequences.sum_dtype)
        scratch = torch.empty_like(sequences.scratch)
        for tile in sequences.tiles:
            _tile_backward(sequences, tile, grad_o, log_sum_exp, means, grad_q, grad_k, grad_v, scratch)
        return (
            grad_q.view_as(q),
            sequences.layout.without_padding(grad_k).to(k.dtype),
            sequences.layout.without_padding(grad_v).to(v.dtype),
            None,
            None,
            None,
        )


def _tile_backward(
    sequences: _Sequences,
    tile: _Tile,
    grad_o_BTGRV: Tensor,
    log_sum_exp_BTGR: Tensor,
    means_BTGR: Tensor,
    grad_q_BTGRK: Tensor,
    grad_k_BGKU: Tensor,
    grad_v_BGVU: Tensor,
    scratch: Tensor,
) -> None:
    """Write the tile's part of grad_q and add its parts of grad_k and grad_v."""
    q = sequences.scaled_queries(tile)
    grad_o = sequences.rows(grad_o_BTGRV, tile)
    # Copies without the extra columns, before these are filled, transposed for the gradients of k and v.
    q_KX, grad_o_VX = (x[..., :-2].flatten(0, 1).t().contiguous() for x in (q, grad_o))
    if sequences.is_base_2:
        q_KX.mul_(math.log(2))
    _subtract_in_product_(q, sequences.row_values(log_sum_exp_BTGR, tile))
    _subtract_in_product_(grad_o, sequences.row_values(means_BTGR, tile))

    scores = _products(q, tile.columns(sequences.k_and_ones), sequences.scratch)
    p = tile.mask_(sequences.power_(scores), 0.0)
    grad_p = _products(grad_o, tile.columns(sequences.v_and_ones), scratch)
    grad_scores = grad_p.mul_(p).flatten(0, 1)
    tile.add_columns_(grad_v_BGVU, torch.mm(grad_o_VX, p.flatten(0, 1)))
    tile.add_columns_(grad_k_BGKU, torch.mm(q_KX, grad_scores))
    grad_q = torch.mm(grad_scores, tile.columns(sequences.k)).mul_(sequences.scale)
    sequences.write(grad_q_BTGRK, tile, grad_q.view(*p.shape[:2], -1))


def _torch_is_faster(dtype: torch.dtype) -> bool:
    """Than tiles, where every query sees all before it (benchmarks/softmax_attention.md)."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())


def blocked_softmax_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int | None,
    scale: float,
    num_sink_tokens: int = 0,
) -> Tensor:
    """Output [B, T, H, V] in q's dtype; gradients reach q, k and v.

    Where every query sees all before it, torch's own flash kernel is as exact, so it is used where it is
    faster.
    """
    T, Tk = q_BTHK.shape[1], k_BSGK.shape[1] - num_sink_tokens
    window = Tk if window is None else min(window, Tk)
    if window == Tk == T and not num_sink_tokens and _torch_is_faster(q_BTHK.dtype):
        return sdpa_softmax_attention(q_BTHK, k_BSGK, v_BSGV, window=None, scale=scale)
    if q_BTHK.dtype == torch.float16:
        # float16 has too few exponent bits for probabilities that are not normalised yet.
        q, k, v = (x.float() for x in (q_BTHK, k_BSGK, v_BSGV))
        return _BlockedSlidingWindowAttention.apply(q, k, v, window, scale, num_sink_tokens).half()
    return _BlockedSlidingWindowAttention.apply(q_BTHK, k_BSGK, v_BSGV, window, scale, num_sink_tokens)
