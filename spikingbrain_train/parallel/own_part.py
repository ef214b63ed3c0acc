"""What of a tensor lies on this rank."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """The elements of this rank, where they lie, of a weight that torch's FSDP2 spreads; of others all.

    Args:
        tensor: of any shape; the result is detached from its graph.

    Returns:
        A tensor without a mesh; some ranks may have none of its rows.
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
