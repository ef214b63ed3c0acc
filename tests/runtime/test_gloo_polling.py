"""However many gloo groups a rank is in, one thread of it polls for them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool


def _threads() -> Counter[str]:
    return Counter(
        (Path("/proc/self/task") / thread / "comm").read_text().strip()
        for thread in os.listdir("/proc/self/task")
    )


def _sums_and_polling_threads(groups: ProcessGroups) -> tuple[list[float], int, int]:
    sums = []
    for _ in range(5):
        group = torch.distributed.new_group(list(range(groups.world_size)))
        value = torch.tensor([1.0 + groups.rank])
        torch.distributed.all_reduce(value, group=group)
        sums.append(value.item())
    threads = _threads()
    return sums, threads["gloo_tcp_loop"], threads["pt_gloo_runloop"]


def test_one_thread_polls_for_all_groups_of_a_rank(ranks: RankPool) -> None:
    for _ in range(2):  # the second world takes the device of the first
        for sums, polling, working in ranks.run(
            _sums_and_polling_threads,
            world_size=2,
            parallel=ParallelConfig(tensor_model_parallel_size=2),
        ):
            assert sums == [3.0] * 5
            assert polling == 1
            assert working > 10, "the groups are not gloo's"
