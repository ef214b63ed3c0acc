"""Parameters outside of linears that tensor-parallel ranks split along their first axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def sharded_first_axes(
    parameters: Mapping[str, Tensor],
    prefix: str,
    sharded_offsets: Any,
    tp_group: ProcessGroup,
    metadata: Any,
) -> dict[str, Any]:
    """Where a rank's parts lie in whole parameters, as ``sharded_state_dict`` says it.

    Args:
        parameters: this rank's parts by name.
        prefix: of the names.
        sharded_offsets: of layers, as megatron-core passes them on.
        tp_group: tensor-parallel ranks.
        metadata: as megatron-core passes it on.
    """
    return make_sharded_tensors_for_checkpoint(
        dict(parameters),
        prefix,
        dict.fromkeys(parameters, 0),
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
