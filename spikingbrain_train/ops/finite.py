"""Are there NaNs or infinities in many tensors? One pass over memory, no copies, one wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity, None where all numbers are finite.

    Args:
        tensors: (name, tensor) of any shape, dtype and device; integers are always finite.
    """
    names, bounds = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() > 0:
            names.append(name)
            # Minimum and maximum are NaN where any number is: a reduction without a mask beside the tensor.
            bounds.append(torch.stack(torch.aminmax(tensor.detach())))
    if not bounds:
        return None
    flags = torch.stack([torch.isfinite(bound).all().to(bounds[0].device) for bound in bounds])
    if flags.all():
        return None
    return names[int(flags.int().argmin())]
