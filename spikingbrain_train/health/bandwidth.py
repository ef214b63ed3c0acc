"""How fast ranks exchange tensors: all of them, those of each host, and each host with two neighbours.

An all-reduce over everybody takes as long everywhere, so that it shows that something is slow and not what.
Ranks of one host among themselves show a GPU or a link within it; the first ranks of two neighbouring hosts
show a network card: of two hosts that are slow together each has another neighbour, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from spikingbrain_train.planning.launch import Launch

if TYPE_CHECKING:
    import torch

    from spikingbrain_train.runtime.accelerator import Accelerator

GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20
"""Sizes at which NCCL and gloo are as fast as they get, or nearly."""
_REPEATS = 4


@dataclass(frozen=True)
class Speeds:
    """Bytes per second that pass each rank (NCCL's "bus bandwidth"); None where a rank has no partner."""

    world: float | None = None
    in_host: float | None = None
    between_hosts: float | None = None
    """The better of two partners."""


@dataclass(frozen=True)
class Exchanged:
    """How a rank came through the exchange."""

    speeds: Speeds | None
    """None where it did not."""
    reached: int = 0
    """The last of the exchanges that it began (``IN_HOST`` ...), its own GPU done with all before."""
    hangs: bool = False
    """It still waits in one."""


IN_HOST, FIRST_NEIGHBOUR, WORLD, LEAVING = 1, 2, 4, 5
"""The exchanges in their order: those of few ranks first, so that one who hangs stops no others in them."""


def partners(node: int, nodes: int) -> list[tuple[int, int]]:
    """The pairs that a node is in, of a ring of at least three nodes.

    First 0 with 1, 2 with 3 ..., then 1 with 2 ..., last the two ends of the list: whoever is in a pair meets
    the other in the same round.
    """
    pairs = []
    for first in (0, 1):
        lower = node - (node - first) % 2
        if lower >= 0 and lower + 1 < nodes:
            pairs.append((lower, lower + 1))
    if node in (0, nodes - 1):
        pairs.append((0, nodes - 1))
    return pairs


def measure(
    launch: Launch,
    accelerator: Accelerator,
    store: torch.distributed.Store,
    seconds: float,
    reach: Callable[[int], None],
) -> Speeds:
    """Join a world of its own, measure, and leave it; every rank calls it.

    Args:
        launch: who this process is.
        accelerator: what its tensors lie on.
        store: of the meeting.
        seconds: that a collective may take.
        reach: is told each exchange when this rank is about to begin it.

    Raises:
        RuntimeError: a rank did not answer within ``seconds``.
    """
    import torch

    from spikingbrain_train.parallel.process_groups import choose_interface, reachable_master

    if launch.world_size == 1:
        return Speeds()
    timeout = timedelta(seconds=seconds)
    # NCCL's watchdog would end the process once a collective is late; this one has to say what it has seen.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    accelerator.bind(launch.local_rank)
    if not accelerator.is_gpu:
        choose_interface(reachable_master(launch))
    torch.distributed.init_process_group(
        accelerator.collective_backend,
        store=torch.distributed.PrefixStore("world", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )
    try:
        local, nodes = launch.local_world_size, launch.world_size // launch.local_world_size
        node = launch.rank // local

        def rate(exchange: int, ranks: list[int]) -> float:
            return _all_reduce(ranks, accelerator, timeout, lambda: reach(exchange))

        in_host = between = None
        if local > 1 and nodes > 1:
            in_host = rate(IN_HOST, list(range(node * local, (node + 1) * local)))
        if launch.local_rank == 0 and nodes > 2:
            found = [
                rate(exchange, [lower * local, upper * local])
                for exchange, (lower, upper) in enumerate(partners(node, nodes), FIRST_NEIGHBOUR)
            ]
            between = max(found)
        world = rate(WORLD, list(range(launch.world_size)))
        reach(LEAVING)
        torch.distributed.barrier(device_ids=[launch.local_rank] if accelerator.is_gpu else None)
    finally:
        torch.distributed.destroy_process_group()
    return Speeds(world, in_host, between)


def _all_reduce(
    ranks: list[int], accelerator: Accelerator, timeout: timedelta, begins: Callable[[], None]
) -> float:
    """Bytes per second that each of these ranks sends and receives; called by all of them."""
    import torch

    whole = len(ranks) == torch.distributed.get_world_size()
    group = None if whole else torch.distributed.new_group(ranks, timeout, use_local_synchronization=True)
    size = GPU_BYTES if accelerator.is_gpu else CPU_BYTES
    tensor = torch.zeros(size // 4, device=accelerator.device_type)
    accelerator.synchronize()
    begins()
    best = float("inf")
    for repeat in range(1 + _REPEATS):  # the first one connects
        accelerator.synchronize()
        started = time.perf_counter()
        torch.distributed.all_reduce(tensor, group=group)
        accelerator.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - started)
    return 2 * (len(ranks) - 1) / len(ranks) * size / best
