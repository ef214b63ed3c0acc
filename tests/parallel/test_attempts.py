"""Ranks that are started again on several machines meet each other, and nobody of an earlier start."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.parallel import process_groups
from spikingbrain_train.parallel.attempts import agree_on_attempt
from spikingbrain_train.planning.launch import Launch


def _start(store: torch.distributed.Store, delays: list[float]) -> set[str]:
    """Each rank in a thread, so many seconds late. Returns the names that they came to."""

    def rank(number: int) -> str:
        time.sleep(delays[number])
        return agree_on_attempt(store, number, len(delays), timeout_seconds=20)

    with ThreadPoolExecutor(len(delays)) as threads:
        return set(threads.map(rank, range(len(delays))))


def test_all_ranks_of_a_start_come_to_one_name_that_no_earlier_start_had() -> None:
    store = torch.distributed.HashStore()
    (first,) = _start(store, [0.0, 0.0, 0.0])
    # The others find the words of ranks that are gone, until the late one is there.
    (second,) = _start(store, [0.0, 0.0, 0.4])
    (third,) = _start(store, [0.4, 0.0, 0.0])
    (fourth,) = _start(store, [0.2, 0.0])  # a node fewer
    assert len({first, second, third, fourth}) == 4


def test_a_start_that_broke_off_half_way_does_not_hold_up_the_next() -> None:
    store = torch.distributed.HashStore()
    for ranks_that_came in ((0, 2), (1,)):
        for rank in ranks_that_came:
            with pytest.raises(PlatformError, match="has waited .* for the other 2 ranks"):
                agree_on_attempt(store, rank, 3, timeout_seconds=0.15)
    assert len(_start(store, [0.0, 0.3, 0.1])) == 1


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_nodes_whose_agents_count_restarts_apart_share_a_store_of_their_own(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, given = torch.distributed.HashStore(), []
    for name, value in (("USE_AGENT_STORE", "True"), ("MAX_RESTARTS", "3"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *_, **__: whole)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **o: given.append(o["store"]))
    accelerator: Any = SimpleNamespace(collective_backend=backend)

    def join(rank: int) -> None:
        launch = Launch(rank, 2, 0, 1, "127.0.0.1", 29500)
        process_groups._join_world(launch, accelerator, timedelta(seconds=20))

    names = []
    try:
        for _ in range(2):
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(join, range(2)))
            names.append(process_groups.restart_prefix())
    finally:
        process_groups._start_name.clear()
    for one, other, before in ((given[0], given[1], []), (given[2], given[3], given[:2])):
        assert not one.check(["address"])
        one.set("address", "mine")
        assert other.check(["address"])
        for earlier in before:
            earlier.set("of the dead", "theirs")
        assert not one.check(["of the dead"])
    assert len(set(names)) == 2
