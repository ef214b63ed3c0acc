"""The pool of gloo ranks reports what its ranks do, also when they fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel import process_groups
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.runtime.accelerator import detect
from tests.distributed import pool
from tests.distributed.pool import RankFailure, RankPool, shares_its_world


def _sum_of_ranks(groups: ProcessGroups, scale: float) -> tuple[int, float]:
    total = torch.tensor([scale * groups.rank])
    torch.distributed.all_reduce(total)
    return os.getpid(), total.item()


def _raise_on_last_rank(groups: ProcessGroups) -> None:
    if groups.rank == groups.world_size - 1:
        raise ValueError("this rank has no luck")
    torch.distributed.barrier()


@shares_its_world
def _raise_and_share(groups: ProcessGroups) -> None:
    _raise_on_last_rank(groups)


def _die(groups: ProcessGroups) -> None:
    if groups.rank == 1:
        print("last words", flush=True)
        os._exit(7)
    torch.distributed.barrier()


def _sleep(groups: ProcessGroups) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as a run in training, whose handler holds it back
    time.sleep(60)


def _own_groups() -> tuple[int, int]:
    groups = process_groups.initialize(
        ParallelConfig(tensor_model_parallel_size=2), detect("cpu"), seed=0, timeout_minutes=1
    )
    return groups.tensor_model_parallel_rank, torch.get_num_threads()


def _return_what_came(groups: ProcessGroups, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + groups.rank


@pytest.fixture(scope="module")
def young_ranks() -> Iterator[RankPool]:
    """Of these tests alone: the ranks of the session may be replaced after any job, for their threads."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_function_runs_on_every_rank_and_results_come_back_in_order(ranks: RankPool, world_size: int) -> None:
    results = ranks.run(_sum_of_ranks, 10.0, world_size=world_size, parallel=ParallelConfig())
    assert [total for _, total in results] == [10.0 * sum(range(world_size))] * world_size
    assert len({pid for pid, _ in results}) == world_size


def _processes(ranks: RankPool, parallel: ParallelConfig) -> set[int]:
    return {pid for pid, _ in ranks.run(_sum_of_ranks, 1.0, world_size=2, parallel=parallel)}


def test_processes_are_reused(young_ranks: RankPool) -> None:
    first = _processes(young_ranks, ParallelConfig())
    assert first == _processes(young_ranks, ParallelConfig(tensor_model_parallel_size=2))


def test_processes_that_have_gathered_many_threads_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = RankPool()
    try:
        first = _processes(ranks, ParallelConfig())
        monkeypatch.setattr(pool, "_MAX_THREADS", 1)
        assert first == _processes(ranks, ParallelConfig())  # found out behind the job
        assert not first & _processes(ranks, ParallelConfig())
    finally:
        ranks.close()


@shares_its_world
def _meeting_and_draw(groups: ProcessGroups) -> tuple[str, int, float]:
    total = torch.ones(1)
    torch.distributed.all_reduce(total, group=groups.collection.tp)
    return os.environ["MASTER_PORT"], int(total.item()), torch.rand(1).item()


def test_functions_that_share_their_world_take_it_over_in_the_same_topology_alone(
    young_ranks: RankPool,
) -> None:
    split = ParallelConfig(tensor_model_parallel_size=2)

    def met(world_size: int, parallel: ParallelConfig) -> tuple[str, int, float]:
        first, *others = young_ranks.run(_meeting_and_draw, world_size=world_size, parallel=parallel)
        assert {(port, total) for port, total, _ in others} <= {first[:2]}
        return first

    first, second = met(2, split), met(2, split)
    assert first == second  # where they meet, and what the generators draw
    assert met(2, ParallelConfig())[:2] != first[:2]
    assert met(1, ParallelConfig())[1] == 1
    four = met(4, split)
    assert four[1] == 2 and four == met(4, split)
    young_ranks.run(_sum_of_ranks, 1.0, world_size=2, parallel=split)  # shares none
    assert met(2, split)[0] not in (first[0], four[0])


def test_a_world_is_not_taken_over_from_a_function_that_has_failed(ranks: RankPool) -> None:
    ranks.run(_meeting_and_draw, world_size=2, parallel=ParallelConfig())
    with pytest.raises(RankFailure, match="this rank has no luck"):
        ranks.run(_raise_and_share, world_size=2, parallel=ParallelConfig())
    assert len(ranks.run(_meeting_and_draw, world_size=2, parallel=ParallelConfig())) == 2


def _folder_of_code(groups: ProcessGroups) -> str:
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    return HF_MODULES_CACHE


def test_ranks_take_code_of_exports_from_the_folder_of_this_process(ranks: RankPool) -> None:
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    found = ranks.run(_folder_of_code, world_size=1, parallel=ParallelConfig())
    assert found == [HF_MODULES_CACHE] == [os.environ["HF_MODULES_CACHE"]]


def test_tensors_travel_both_ways(ranks: RankPool) -> None:
    results = ranks.run(_return_what_came, torch.arange(3), world_size=2, parallel=ParallelConfig())
    assert torch.equal(results[1], torch.tensor([1, 2, 3]))


def test_function_can_form_its_own_groups(ranks: RankPool) -> None:
    assert ranks.run(_own_groups, world_size=2) == [(0, 1), (1, 1)]


def test_exception_names_the_rank_and_carries_its_traceback(ranks: RankPool) -> None:
    started = time.monotonic()
    with pytest.raises(
        RankFailure, match="(?s)rank 1 of 2 failed.*_raise_on_last_rank.*this rank has no luck"
    ):
        ranks.run(_raise_on_last_rank, world_size=2, parallel=ParallelConfig())
    assert time.monotonic() - started < 60  # rank 0 waits in a barrier and is not waited for


def test_death_of_a_rank_is_reported_and_the_pool_recovers(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="(?s)rank 1 of 2 died with exit code 7.*last words"):
        ranks.run(_die, world_size=2, parallel=ParallelConfig())
    results = ranks.run(_sum_of_ranks, 1.0, world_size=2, parallel=ParallelConfig())
    assert [total for _, total in results] == [1.0, 1.0]


def test_hanging_rank_is_reported_with_the_place_where_it_hangs(ranks: RankPool) -> None:
    ranks.run(
        _sum_of_ranks, 1.0, world_size=1, parallel=ParallelConfig()
    )  # so that starting up does not count
    with pytest.raises(RankFailure, match="(?s)did not finish within 2 s.*in _sleep"):
        ranks.run(_sleep, world_size=1, parallel=ParallelConfig(), timeout=2)
