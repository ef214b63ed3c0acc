"""Whether a rank's share of a run fits into the memory of its device. Pure Python: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.parallel import ClusterConfig
from spikingbrain_train.planning.launch import expects_gpu, memory_limit
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.reporting.quantities import size

MARGIN = 0.1
"""Share of a device that has to stay free of what is estimated; chosen here, and no measurement.

The estimate sums tensors that live at the same time. Beside them a device holds what cannot be known before a
run: the driver's context and loaded kernels, workspaces of matrix products and attention, NCCL's buffers for
every group that a rank is in, and holes between tensors that the allocator cannot use."""


class Fit(str, Enum):
    """How a share lies in a device."""

    fits = "fits"
    """With the margin."""
    tight = "tight"
    """Without all of the margin: it may run, or end out of memory."""
    too_large = "does not fit"
    """The estimate alone is more than the device has."""


@dataclass(frozen=True)
class DeviceMemory:
    """What one rank can get."""

    bytes: float
    source: str
    """Who says so, in words."""

    def fit(self, needed: float) -> Fit:
        """How ``needed`` bytes lie in it."""
        if needed > self.bytes:
            return Fit.too_large
        return Fit.fits if needed <= (1 - MARGIN) * self.bytes else Fit.tight


def device_memory(cluster: ClusterConfig, world_size: int) -> DeviceMemory | None:
    """The memory of a rank's device: as stated, or on the CPU its part of this machine's.

    Returns:
        None where it is not known: on GPUs whose memory is not stated.
    """
    if cluster.memory_gib is not None:
        return DeviceMemory(cluster.memory_gib * GIB, f"cluster.memory_gib={cluster.memory_gib:g}")
    limit = None if expects_gpu(cluster) else memory_limit()
    if limit is None:
        return None
    shared = f", shared by {world_size} ranks" if world_size > 1 else ""
    return DeviceMemory(limit / world_size, f"this machine's {size(limit)}{shared}")
