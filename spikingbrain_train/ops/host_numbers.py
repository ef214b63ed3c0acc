"""What the host knows, on the GPU, without a wait for what the GPU has still to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of numbers of the host.

    ``torch.tensor(numbers, device="cuda")`` and a plain ``to`` copy from pageable memory and return when the
    stream has come to the end of it: once a layer, that keeps the host from running ahead. From page-locked
    memory the copy takes its place in the stream.

    Args:
        numbers: a list, or a tensor on the CPU of any shape.
        device: where they are wanted.
        dtype: of the result.

    Returns:
        Of the shape of ``numbers``; on the CPU perhaps ``numbers`` itself.
    """
    on_host = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cpu":
        return on_host
    return on_host.pin_memory().to(device, non_blocking=True)
