"""A name for this start of the ranks, which no earlier start in the same store had.

torchrun's store outlives the ranks: those that it starts again would dial the addresses that the dead ones
have left there. On one machine its count of restarts tells the starts apart. Agents of several machines count
each for itself, and one that takes a lost one's place begins at zero: there the ranks agree.
"""

from __future__ import annotations

import json
import secrets
import time

import torch

from spikingbrain_train.errors import PlatformError

_ARRIVED, _PROPOSED, _ACCEPTED, _SETTLED = "arrived", "proposed", "accepted", "settled"
_POLL_SECONDS = 0.1
_RANKS_PER_POLL = 64
"""More ranks ask less often, so that the store can answer all of them."""


def agree_on_attempt(
    store: torch.distributed.Store, rank: int, world_size: int, timeout_seconds: float
) -> str:
    """Wait until all ranks of this start are there, and name it.

    Every process announces itself by a word of its own. Rank 0 proposes a name together with the words that
    it has found; a rank accepts what names its own word, so that a word of an earlier start, found because
    the new process was not there yet, is accepted by nobody and replaced in the next proposal.

    Args:
        store: that all ranks see, and earlier starts saw.
        rank: of this process.
        world_size: of this start.
        timeout_seconds: how long to wait for the others.

    Returns:
        The name, the same on all ranks.

    Raises:
        PlatformError: some rank does not come.
    """
    own = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_seconds
    store.set(f"{_ARRIVED}/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            _propose(store, own, world_size)
        if (name := _accepted(store, rank, own, world_size)) is not None:
            return name
        time.sleep(_POLL_SECONDS * max(1.0, world_size / _RANKS_PER_POLL))
    raise PlatformError(
        f"rank {rank} has waited {timeout_seconds / 60:g} min for the other {world_size - 1} ranks to start "
        "(cluster.timeout_minutes); look at the first error of the other nodes."
    )


def _propose(store: torch.distributed.Store, name: str, world_size: int) -> None:
    """Rank 0: say who has arrived, and that all have accepted it once they have."""
    keys = [f"{_ARRIVED}/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return
    words = [store.get(key).decode() for key in keys]
    store.set(_PROPOSED, json.dumps([name, words]))
    others = [f"{_ACCEPTED}/{name}/{word}" for word in words[1:]]
    if store.check(others):
        store.set(f"{_SETTLED}/{name}", "yes")


def _accepted(store: torch.distributed.Store, rank: int, own: str, world_size: int) -> str | None:
    """The name, once all ranks have accepted it."""
    if not store.check([_PROPOSED]):
        return None
    name, words = json.loads(store.get(_PROPOSED))
    if len(words) != world_size or words[rank] != own:
        return None
    store.set(f"{_ACCEPTED}/{name}/{own}", "yes")
    return name if store.check([f"{_SETTLED}/{name}"]) else None
