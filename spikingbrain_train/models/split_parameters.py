"""Parameters beside the weights of linears that tensor-parallel ranks split along an axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def sharded_axes(
    parameters: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    prefix: str,
    sharded_offsets: Any,
    tp_group: ProcessGroup,
    metadata: Any,
) -> dict[str, Any]:
    """Where a rank's parts lie in whole parameters, as ``sharded_state_dict`` says it.

    Args:
        parameters: this rank's parts by name.
        axes: the axis along which each is split; None where every rank holds all of it.
        prefix: of the names.
        sharded_offsets: of layers and experts, as megatron-core passes them on.
        tp_group: tensor-parallel ranks.
        metadata: as megatron-core passes it on.
    """
    return make_sharded_tensors_for_checkpoint(
        dict(parameters),
        prefix,
        {name: axis for name, axis in axes.items() if axis is not None},
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )


def sharded_first_axes(
    parameters: Mapping[str, Tensor],
    prefix: str,
    sharded_offsets: Any,
    tp_group: ProcessGroup,
    metadata: Any,
) -> dict[str, Any]:
    """:func:`sharded_axes` of parameters that are split along their first one."""
    axes = dict.fromkeys(parameters, 0)
    return sharded_axes(parameters, axes, prefix, sharded_offsets, tp_group, metadata)
