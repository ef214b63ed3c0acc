"""Which matrices lie in one weight: q, k and v in ``linear_qkv``, gate and up projection in ``linear_fc1``.

megatron-core joins them for one matrix product, and puts rows that belong together on the same
tensor-parallel rank: of every query group its q heads, its k and its v; of a SwiGLU's channels both rows. So
a rank holds a part of each matrix, in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spikingbrain_train.config.linear_transforms import Projection


@dataclass(frozen=True)
class JoinedRows:
    """Several matrices whose rows lie in one weight."""

    shares: tuple[int, ...]
    """Units of rows that a block has of each of them, in order."""
    unit: int | None = None
    """Rows of a unit; None where the weight, or a rank's part of it, is one block."""

    def parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Views [blocks, rows of a block, inputs] of a weight [rows, inputs]: the rows of each matrix."""
        unit = self._unit(len(weight))
        blocks = weight.unflatten(0, (-1, unit * sum(self.shares)))
        return blocks.split([unit * share for share in self.shares], dim=1)

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """What a weight gives, [..., rows], of what each of its matrices gives, [..., rows of the matrix]."""
        unit = self._unit(sum(each.shape[-1] for each in outputs))
        blocks = [
            each.unflatten(-1, (-1, unit * share)) for each, share in zip(outputs, self.shares, strict=True)
        ]
        return torch.cat(blocks, dim=-1).flatten(-2)

    def matrix_of_rows(self, rows: int, device: torch.device) -> Tensor:
        """[rows] int64: to which of the matrices each row of a weight belongs."""
        unit = self._unit(rows)
        # Filled there: numbers that are copied to a GPU, or that sizes are read from, would be waited for.
        block = torch.cat(
            [torch.full((unit * share,), matrix, device=device) for matrix, share in enumerate(self.shares)]
        )
        return block.repeat(rows // len(block))

    def _unit(self, rows: int) -> int:
        unit = rows // sum(self.shares) if self.unit is None else self.unit
        assert rows % (unit * sum(self.shares)) == 0, f"{rows} rows are no blocks of {self}"
        return unit


RowsOf = Callable[[TransformerConfig], JoinedRows | None]
"""Of the config that a linear is built with; None where the weight is one matrix."""


def rows_of_projection(projection: Projection) -> RowsOf:
    """How megatron-core joins the rows of a projection."""
    return _JOINED.get(projection, one_matrix)


def one_matrix(config: TransformerConfig) -> JoinedRows | None:
    """Of a weight that a Hugging Face checkpoint stores as one matrix."""
    return None


def _query_groups(config: TransformerConfig) -> JoinedRows:
    assert config.num_query_groups is not None and config.kv_channels is not None
    heads_per_group = config.num_attention_heads // config.num_query_groups
    return JoinedRows((heads_per_group, 1, 1), config.kv_channels)


def _gate_and_up(config: TransformerConfig) -> JoinedRows | None:
    return JoinedRows((1, 1)) if config.gated_linear_unit else None


_JOINED: dict[Projection, RowsOf] = {Projection.qkv: _query_groups, Projection.mlp_fc1: _gate_and_up}
