"""Scales of the channels of linear attention's heads, by non-negative least squares.

A head of linear attention is a sum over channels, each with a decay of its own. Softmax attention says how
much of each it takes: ``min |sum_c a_c o_c - A|^2`` with a_c >= 0, o_c what channel c gives and A what the
dense source's head gives on the same token, before its output projection. It stands where Taylor-Calibrate
(arXiv 2606.16429) has one least-squares scale of a head's values: one factor a head is divided out by the
norm behind the recurrence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikingbrain_train.parallel.process_groups import ProcessGroups

SAMPLED = 8
"""Every so manieth token is an equation: neighbours say the same."""
_RIDGE = 0.03
_ITERATIONS = 500
_LEAST = 0.05
"""Share of the mean channel of its head below which no channel falls, so that all of them can still learn."""


class ChannelScales:
    """The least squares of one layer.

    Args:
        groups: process groups; sums are reduced over data- and context-parallel ranks.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, outputs_NHCV: Tensor, heads_NHV: Tensor) -> None:
        """Take one micro-batch into the sums.

        Args:
            outputs_NHCV: what each channel of this tensor-parallel rank's heads gives.
            heads_NHV: what the dense source's heads give on the same tokens.
        """
        o_HCM = outputs_NHCV.permute(1, 2, 0, 3).flatten(2)
        a_HM1 = heads_NHV.float().transpose(0, 1).flatten(1).unsqueeze(-1)
        gram, cross = (o_HCM @ o_HCM.transpose(1, 2)).double(), (o_HCM @ a_HM1).squeeze(-1).double()
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross

    def solve(self) -> Tensor:
        """[H, C] float64 factors, none of them 0, of mean 1 in every head: weights keep about their size."""
        assert self.gram is not None and self.cross is not None, "there are calibration tokens"
        for sums in (self.gram, self.cross):
            torch.distributed.all_reduce(sums, group=self.groups.collection.dp_cp)
        # Channels of very different size are solved in units in which all have the same.
        unit_HC = self.gram.diagonal(dim1=1, dim2=2).sqrt()
        unit_HC = torch.maximum(unit_HC, 1e-3 * unit_HC.mean(1, keepdim=True)).clamp_min(1e-20)
        gram = self.gram / unit_HC.unsqueeze(2) / unit_HC.unsqueeze(1)
        gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
        share_HC = non_negative_least_squares(gram, self.cross / unit_HC)
        least_H1 = (_LEAST * share_HC.mean(1, keepdim=True)).clamp_min(1e-6)
        scale_HC = torch.maximum(share_HC, least_H1) / unit_HC
        return scale_HC / scale_HC.mean(1, keepdim=True)


def non_negative_least_squares(gram_HCC: Tensor, cross_HC: Tensor) -> Tensor:
    """``min x^T gram x - 2 cross^T x`` over x >= 0.

    By accelerated projected gradients (Beck and Teboulle, SIAM J. Imaging Sciences 2(1), 2009).

    Args:
        gram_HCC: positive definite.
        cross_HC: the linear terms.

    Returns:
        [H, C].
    """
    step = 1 / torch.linalg.eigvalsh(gram_HCC)[:, -1:].clamp_min(1e-30)
    x = ahead = torch.zeros_like(cross_HC)
    t = 1.0
    for _ in range(_ITERATIONS):
        gradient = (gram_HCC @ ahead.unsqueeze(-1)).squeeze(-1) - cross_HC
        new = (ahead - step * gradient).clamp_min(0)
        t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / t_new * (new - x)
        x, t = new, t_new
    return x
