"""A selective scan's first weights, made of the attention that it replaces.

Mamba in the Llama (Wang et al., arXiv 2408.15237, section 2) reads attention as a recurrence: x is what the
values are, B the keys, C the queries, and the output projection stays. There every head has a B and a C of
its own, made of the layer's input. Mamba-1 has one B and one C for all channels, made of x. So here

- the channels of x are the values of the query heads, side by side, each value v as the pair v and -v where
  there is room for it: behind x stands a SiLU, and silu(v) - silu(-v) = v (one alone counts twice, which is v
  for small v);
- B and C are those of the rank-N bilinear form nearest to the mean over heads of the scores q k^T, keys and
  queries written as linear functions of the values, by least squares over inputs of unit covariance;
- the output projection has the source's columns, with the signs of the pairs, times a factor;
- the gate is open where the input projection has a bias to open it by.

Rotary positions are left out, and so are biases of keys and queries. Step sizes, decays and D are Mamba's.

Shape letters: h hidden_size, P query heads times width, V query groups times width, D channels, N state size,
R time_step_rank, G query groups, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.architecture.initializers import OPEN_GATE, ScanPart
from spikingbrain_train.architecture.rotary import softmax_scale
from spikingbrain_train.conversion.source import Source
from spikingbrain_train.models.fused_tensors import copy_heads

_RIDGE = 1e-4
"""Of the least squares, in units of the mean variance of a value."""


class ScanStart:
    """Reads the attention of a dense source as a selective scan.

    Args:
        source: a dense checkpoint.
        layer: 0-based.
        channels: D; P, or an even multiple of it.
        state_size: N.
    """

    def __init__(self, source: Source, layer: int, channels: int, state_size: int) -> None:
        self.source = source
        self.layer = layer
        self.state_size = state_size
        self.model = source.model
        self.heads_size = self.model.num_attention_heads * self.model.kv_channels
        self.copies = channels // self.heads_size

    def of(self, part: ScanPart, drawn: Tensor, output_scale: float) -> Tensor:
        """The first values of a weight as Hugging Face lays it out.

        Args:
            part: which.
            drawn: its shape and Mamba's own first values, float32; what attention does not give stays.
            output_scale: factor of the output projection.
        """
        if part is ScanPart.input_weight:  # [2 D, h]: x, then the gate
            return torch.cat([self._channels(self._read("v_weight")), drawn.chunk(2)[1]])
        if part is ScanPart.input_bias:  # [2 D]
            x_D, gate_D = drawn.chunk(2)
            if self.model.add_qkv_bias:
                x_D = self._channels(self._read("v_bias"))
            return torch.cat([x_D, torch.full_like(gate_D, OPEN_GATE)])
        if part is ScanPart.scan_weight:  # [R + 2 N, D]
            return self._scan_weight(drawn)
        if part is ScanPart.output_weight:  # [h, D]
            columns_Dh = self._channels(self._read("o_weight").t(), copied=False)
            return columns_Dh.t() * (output_scale * 2 / self.copies)
        assert part is ScanPart.output_bias  # [h]
        return self._read("o_bias") if self.model.add_output_bias else drawn

    def _read(self, role: str) -> Tensor:
        return self.source.read(role, self.layer).float()

    def _channels(self, values: Tensor, *, copied: bool = True) -> Tensor:
        """[D, ...] from the values of groups [V, ...], or of heads [P, ...]: copies with signs in turn."""
        of_heads = copy_heads(values, self.heads_size, self.model) if copied else values
        signs = 1.0 - 2.0 * (torch.arange(self.copies) % 2)
        return torch.stack([sign * of_heads for sign in signs], dim=1).flatten(0, 1)

    def _scan_weight(self, drawn: Tensor) -> Tensor:
        """Rows of B and C; those of the step sizes are drawn, and states beyond the width of V are empty."""
        result, share = drawn.clone(), 2 / self.copies
        share /= self.model.num_attention_heads // self.model.num_query_groups
        B_rows, C_rows = result[-2 * self.state_size :].chunk(2)
        for rows, of_values_NV in zip((B_rows, C_rows), self._keys_and_queries(), strict=True):
            rows.zero_()
            rows[: len(of_values_NV)] = share * self._channels(of_values_NV.t()).t()
        return result

    def _keys_and_queries(self) -> tuple[Tensor, Tensor]:
        """Keys and queries of the nearest form of rank N, as functions of the values: [up to N, V] each."""
        norm_h = self._read("input_norm")
        q_Ph, k_Vh, v_Vh = (self._read(f"{letter}_weight") * norm_h for letter in "qkv")
        if self.model.qk_layernorm:
            q_Ph, k_Vh = self._normed(q_Ph, "q_norm"), self._normed(k_Vh, "k_norm")
        gram_VV = v_Vh @ v_Vh.t()
        gram_VV.diagonal().add_(_RIDGE * gram_VV.diagonal().mean())
        q_PV, k_VV = (torch.linalg.solve(gram_VV, v_Vh @ x.t()).t() for x in (q_Ph, k_Vh))
        groups = (self.model.num_query_groups, -1, self.model.kv_channels)
        # The heads of a group read the same keys, so that their queries add up.
        q_GKV = q_PV.reshape(*groups, q_PV.shape[1]).sum(1)
        scores_VV = q_GKV.flatten(0, 1).t() @ k_VV
        scores_VV *= softmax_scale(self.model) / self.model.num_attention_heads
        rank = min(self.state_size, len(scores_VV))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # of the directions that the decomposition begins with
            U_VN, size_N, V_VN = torch.svd_lowrank(scores_VV, q=min(rank + 8, len(scores_VV)), niter=4)
        root_N = size_N[:rank].sqrt()
        return (V_VN[:, :rank] * root_N).t(), (U_VN[:, :rank] * root_N).t()

    def _normed(self, rows: Tensor, norm: str) -> Tensor:
        """Keys or queries behind their norm, whose divisor is that of inputs of unit covariance."""
        heads = rows.unflatten(0, (-1, self.model.kv_channels))
        size = heads.square().sum(-1).mean(1).sqrt()
        return (heads / size[:, None, None] * self._read(norm)[:, None]).flatten(0, 1)
