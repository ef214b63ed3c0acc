"""One polling thread for all gloo groups of a process.

torch gives every gloo group a device of its own, and with it a thread that looks for work a hundred times a
second (``epoll_wait`` for 10 ms in gloo's transport/tcp/loop.cc). A rank is in twenty groups: four ranks
on a small machine wake up 8,000 times a second for nothing. Groups can share a device; torch's own Python
code gives no way to say so.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

from spikingbrain_train.runtime.patch import ON_CPU, Patch

_WORKERS_PER_DEVICE = 2  # torch's own number


def share_gloo_devices() -> None:
    """Let the groups of this process that bind to the same interface share a device."""
    from torch.distributed import distributed_c10d

    torchs: Any = distributed_c10d  # whose stubs do not tell of the options
    own: Any = torchs.ProcessGroupGloo

    class SharedDeviceProcessGroupGloo(own):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = own._Options()
            options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
            options._threads = _WORKERS_PER_DEVICE * len(options._devices)
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    torchs.ProcessGroupGloo = SharedDeviceProcessGroupGloo


@cache
def _devices(interfaces: str) -> list[Any]:
    """A device for each of the interfaces (comma-separated), or that of the host's name: torch's choice."""
    from torch.distributed import ProcessGroupGloo

    if not interfaces:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=interface) for interface in interfaces.split(",")]


PATCHES = (
    Patch(
        name="one_gloo_device",
        changes="torch.distributed.distributed_c10d.ProcessGroupGloo: groups of a process share their device",
        reason="every group would poll a hundred times a second in a thread of its own; a rank has about 20",
        apply=share_gloo_devices,
        platforms=ON_CPU,
    ),
)
