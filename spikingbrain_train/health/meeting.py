"""Ranks that meet in torch's key-value store, where rank 0 waits for nobody longer than it was told.

No collective is used: those hang, or end with an error about somebody else, where one rank does not come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.health.facts import host_name
from spikingbrain_train.planning.launch import Launch

if TYPE_CHECKING:
    from torch.distributed import Store

_PAUSE = 0.02
"""Seconds between two looks of rank 0 into the store."""
_CLOCK_READINGS = 5


class Meeting:
    """One rank's place in it.

    Args:
        launch: who this process is.
        store: shared by all ranks.
        seconds: how long a rank is waited for.
    """

    def __init__(self, launch: Launch, store: Store, seconds: float) -> None:
        self.launch, self.store, self.seconds = launch, store, seconds

    @classmethod
    def join(cls, launch: Launch, seconds: float) -> Meeting:
        """Connect to the store of rank 0, or of torchrun's agent; makes it on rank 0 of other launchers.

        Raises:
            PlatformError: rank 0 cannot be reached in time, or its port is taken.
        """
        import os

        from torch.distributed import HashStore, PrefixStore, TCPStore

        from spikingbrain_train.parallel.process_groups import reachable_master, restart_prefix

        if launch.master_addr is None:
            return cls(launch, HashStore(), seconds)
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_master = launch.rank == 0 and not by_agent
        where = f"{launch.master_addr}:{launch.master_port}"
        master = reachable_master(launch)
        try:
            store = TCPStore(
                master,
                launch.master_port,
                is_master=is_master,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            if is_master:
                why = "; ".join(str(error).split("\n")[:1])
                raise PlatformError(
                    f"rank 0 cannot listen at {where} on {host_name()} ({why}); choose another MASTER_PORT"
                ) from None
            raise PlatformError(
                f"rank {launch.rank} on {host_name()} cannot reach rank 0 at {where} within "
                f"{seconds:g} s; see whether rank 0 has started, and whether this node can "
                "reach MASTER_ADDR"
            ) from None
        return cls(launch, PrefixStore(f"health_check/{restart_prefix()}", store), seconds)

    def tell(self, what: str, value: Any) -> None:
        """Leave this rank's word about something, which is JSON."""
        self.store.set(f"{what}/{self.launch.rank}", json.dumps(value))
        self.store.add(f"{what}/told", 1)

    def gather(self, what: str, seconds: float) -> dict[int, Any]:
        """On rank 0: the words of all ranks that have told them in time."""
        world = self.launch.world_size

        def all_told() -> bool:
            return self.store.add(f"{what}/told", 0) >= world

        self.wait_until(all_told, seconds)
        told = [rank for rank in range(world) if self.store.check([f"{what}/{rank}"])]
        return {rank: json.loads(self.store.get(f"{what}/{rank}")) for rank in told}

    def wait_until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """On rank 0: wait, and show the time meanwhile. Whether it holds in the end."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                return False
            self.show_time()
            time.sleep(_PAUSE)
        return True

    def announce(self, what: str, value: Any) -> None:
        """On rank 0: what all others wait for with :meth:`hear`."""
        self.store.set(what, json.dumps(value))

    def hear(self, what: str, seconds: float) -> Any:
        """What rank 0 has announced.

        Raises:
            PlatformError: it has not, in time, or is gone.
        """
        deadline = time.monotonic() + seconds
        try:
            self.store.wait([what], timedelta(seconds=seconds))
            return json.loads(self.store.get(what))
        except RuntimeError:
            if time.monotonic() < deadline:
                raise self.lost() from None
            raise PlatformError(
                f"rank {self.launch.rank} on {host_name()} has heard nothing of rank 0 for {seconds:g} s; "
                f"look at the node of rank 0, {self.launch.master_addr}"
            ) from None

    def lost(self) -> PlatformError:
        """Of a rank whose connection to rank 0 has ended."""
        return PlatformError(
            f"rank {self.launch.rank} on {host_name()} has lost rank 0, which has ended or cannot be reached "
            f"any more; see what it has said, and look at its node, {self.launch.master_addr}"
        )

    def show_time(self) -> None:
        """On rank 0: write the time into the store."""
        self.store.set("time", repr(time.time()))

    def clock_seconds(self) -> float:
        """This host's clock less that of rank 0, as long as that shows its time; exact to some milliseconds.

        What is read is late by the way through the store and by a part of a pause: the reading that is least
        late counts.
        """
        differences: list[float] = []
        last = None
        deadline = time.monotonic() + self.seconds
        while len(differences) < _CLOCK_READINGS and time.monotonic() < deadline:
            shown = self.store.get("time")
            if shown != last and last is not None:
                differences.append(time.time() - float(shown))
            last = shown
            time.sleep(_PAUSE / 10)
        return min(differences, default=0.0)

    def leave(self) -> None:
        """Rank 0 holds the store until the others have gone."""
        others = self.launch.world_size - 1
        if self.launch.rank != 0:
            self.store.add("left", 1)
        elif others:
            self.wait_until(lambda: self.store.add("left", 0) >= others, min(self.seconds, 10.0))
