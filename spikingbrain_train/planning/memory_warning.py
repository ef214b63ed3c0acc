"""What a run says before it builds a model that its devices cannot hold. Pure Python: no torch."""

from __future__ import annotations

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.fit import DeviceMemory, Fit, device_memory
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.remedies import remedies, together


def memory_warning(config: RunConfig, world_size: int, device_bytes: int | None) -> str | None:
    """The warning of a run whose estimate is more than its devices have; None where it may fit.

    It is no refusal: activations are an estimate.

    Args:
        config: the run; its precision is settled.
        world_size: ranks of the run.
        device_bytes: memory of the device as it says itself, None on the CPU. cluster.memory_gib goes before.
    """
    device = None
    if config.cluster.memory_gib is not None:
        device = device_memory(config.cluster, world_size)
    elif device_bytes is not None:
        device = DeviceMemory(device_bytes, "as the device says")
    plan = plan_run(config, world_size)
    needed = plan.fullest.memory.total
    if device is None or device.fit(needed) is not Fit.too_large:
        return None
    text = (
        f"warning: the fullest rank needs about {needed / GIB:.1f} GiB by the plan's estimate, but its "
        f"device has {device.bytes / GIB:.1f} GiB ({device.source}): the run will probably end out of memory"
    )
    found = remedies(plan, device)
    fitting = [remedy for remedy in found if device.fit(remedy.needed) is Fit.fits]
    combined = None if fitting else together(found, device)
    for remedy in fitting[:1] or ([combined] if combined is not None else found[:1]):
        text += f"; {' '.join(remedy.arguments())} would take {remedy.needed / GIB:.1f}"
    return text + " (dry_run=true shows more)"
