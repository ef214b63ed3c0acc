"""Feed-forwards whose gate has zeros: FATReLU, and few tokens on a CPU without the rows that zeros meet.

Part of the modelling code of a checkpoint; needs torch only. Where a token's gate is closed, a row of the up
projection and a column of the down projection are not read (ProSparse, arXiv 2402.13516, section 4.3; Deja
Vu, arXiv 2310.17157): of a feed-forward of which 88 % is zero, 41 % of the weights are. The columns are read
from a transposed matrix, in which they are rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_TOKENS = 4
"""Of more tokens the whole matrices are read once for all."""
MOST_ACTIVE = 0.4
"""Share of the channels, over all tokens together, up to which single rows are read."""
_ROWS_AT_A_TIME = 64
"""That are gathered before they are multiplied: as many as stay in a core's cache."""


class FATReLU(nn.Module):
    """x where it is at least `threshold`, else 0; ReLU where that is 0 (arXiv 2402.13516, section 3.2)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(closed(x, self.threshold), 0)


def closed(gate: Tensor, threshold: float) -> Tensor:
    """Where a gate is zero; not where it is NaN."""
    return gate <= 0 if threshold == 0 else gate < threshold


def threshold_of(activation: nn.Module) -> float | None:
    """Below which an activation is zero; None where there is no such threshold."""
    if isinstance(activation, FATReLU):
        return activation.threshold
    return 0.0 if isinstance(activation, nn.ReLU) else None


def can_skip(x: Tensor) -> bool:
    """Whether an input [..., D] is of few tokens, in wide numbers on a CPU, and nothing learns from it."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and 0 < x.numel() <= FEW_TOKENS * x.shape[-1]
    )


def active_product(
    x_ND: Tensor, gate_NF: Tensor, threshold: float, up_FD: Tensor, up_bias_F: Tensor | None, down_FD: Tensor
) -> Tensor | None:
    """`down(FATReLU(gate) * up(x))` of few tokens, which reads no rows where the gate is closed.

    Args:
        x_ND: input of the up projection.
        gate_NF: what the gate projection makes of it.
        threshold: of the gate; 0 is ReLU.
        up_FD: weight of the up projection, its rows contiguous.
        up_bias_F: its bias.
        down_FD: weight of the down projection, transposed, its rows contiguous.

    Returns:
        [N, D], without the down projection's bias; None where so many gates are open that reading everything
        is faster.
    """
    is_open = closed(gate_NF, threshold).logical_not_()
    if int(is_open.sum()) > MOST_ACTIVE * gate_NF.shape[1]:
        return None
    outputs = []
    for x_D, gate_F, open_F in zip(x_ND, gate_NF, is_open, strict=True):
        rows = open_F.nonzero().flatten()
        inside = rows_times(up_FD, rows, x_D)
        if up_bias_F is not None:
            inside += up_bias_F[rows]
        outputs.append(weighted_rows(down_FD, rows, inside.mul_(gate_F[rows])))
    return torch.stack(outputs)


def rows_times(weight_FD: Tensor, rows: Tensor, x_D: Tensor) -> Tensor:
    """`weight[rows] @ x`, [len(rows)], without a copy of all these rows."""
    found = weight_FD.new_empty(len(rows))
    # One place for all of them: memory of this size would be given back to the system and asked for again.
    gathered = weight_FD.new_empty(min(_ROWS_AT_A_TIME, len(rows)), weight_FD.shape[1])
    for some, products in zip(rows.split(_ROWS_AT_A_TIME), found.split(_ROWS_AT_A_TIME), strict=True):
        torch.mv(torch.index_select(weight_FD, 0, some, out=gathered[: len(some)]), x_D, out=products)
    return found


def weighted_rows(weight_FD: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`weights @ weight[rows]`, [D], which copies no row."""
    if not len(rows):
        return weight_FD.new_zeros(weight_FD.shape[1])
    bag = F.embedding_bag(rows[None], weight_FD, per_sample_weights=weights[None], mode="sum")
    return bag[0]


def sparse_mlp(
    x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module
) -> Tensor | None:
    """What a feed-forward of plain linears makes of few tokens on a CPU, [..., D] to the same.

    The weight of `down` is laid out anew the first time: the same numbers, the transposed ones contiguous.

    Returns:
        None where that is not how it is computed: another activation, many tokens or open gates, linears that
        are more than a matrix, or are watched.
    """
    threshold = threshold_of(activation)
    linears = (gate, up, down)
    if threshold is None or not can_skip(x) or not all(_is_plain(linear, x) for linear in linears):
        return None
    x_ND = x.reshape(-1, x.shape[-1])
    lay_out_transposed(down)
    product = active_product(x_ND, gate(x_ND), threshold, up.weight, up.bias, down.weight.t())
    if product is None:
        return None
    return (product if down.bias is None else product + down.bias).view_as(x)


def lay_out_transposed(linear: nn.Linear) -> None:
    """Let the columns of a linear's weight be contiguous; its values and its shape stay."""
    if not linear.weight.t().is_contiguous():
        with torch.inference_mode(False), torch.no_grad():  # it may learn afterwards
            linear.weight.data = linear.weight.data.t().contiguous().t()


def _is_plain(linear: nn.Linear, x: Tensor) -> bool:
    """Whether it multiplies `x` by its weight, and does nothing else."""
    is_watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    if type(linear) is not nn.Linear or is_watched:
        return False
    return linear.weight.dtype == x.dtype and linear.weight.device == x.device


__all__ = ["FATReLU", "sparse_mlp"]
