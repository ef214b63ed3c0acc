"""Process groups form from the config and the launcher's environment, or refuse with one sentence."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.parallel import process_groups
from spikingbrain_train.parallel.process_groups import ProcessGroups, threads_per_rank
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.planning.parallel_checks import how_to_start
from spikingbrain_train.runtime.accelerator import detect
from tests.distributed.pool import RankPool

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


def test_process_without_a_launcher_is_a_world_of_its_own() -> None:
    assert Launch.from_environment({"PATH": "/bin"}) == Launch(0, 1, 0, 1, None)


def test_launcher_variables_are_read() -> None:
    node = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Launch.from_environment(LAUNCHED | node) == Launch(3, 8, 1, 2, "node-a", 29500)


def test_incomplete_launch_names_what_is_missing() -> None:
    with pytest.raises(PlatformError, match="missing: MASTER_ADDR, MASTER_PORT"):
        Launch.from_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_launch_variable_that_is_no_number_is_refused() -> None:
    with pytest.raises(PlatformError, match="must be numbers"):
        Launch.from_environment(LAUNCHED | {"RANK": "three"})


@pytest.mark.parametrize(
    ("parallel", "world_size", "sentence"),
    [
        (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 6, "start 4 ranks or"),
        (ParallelConfig(tensor_model_parallel_size=2), 1, "start 2 ranks or a multiple"),
        (ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=3), 4, "are 2 replicas; .* start 6"),
    ],
)
def test_world_that_does_not_fit_is_refused_before_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, world_size: int, sentence: str
) -> None:
    for name, value in (LAUNCHED | {"RANK": "0", "WORLD_SIZE": str(world_size)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=sentence):
        process_groups.initialize(parallel, detect("cpu"), seed=0)


def test_an_interface_that_is_not_there_is_refused_before_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LAUNCHED | {"GLOO_SOCKET_IFNAME": "nowhere7"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        PlatformError, match=r"GLOO_SOCKET_IFNAME=nowhere7 names no network .* which has .*lo"
    ):
        process_groups.initialize(ParallelConfig(), detect("cpu"), seed=0)


def test_cores_are_divided_over_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_groups, "available_cores", lambda: 8)
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    assert threads_per_rank(1, {}) == 8
    assert threads_per_rank(2, {}) == 4
    assert threads_per_rank(16, {}) == 1
    assert threads_per_rank(2, torchrun) == 4  # torchrun's default, nobody's choice
    assert threads_per_rank(2, torchrun | {"OMP_NUM_THREADS": "3"}) == 3
    assert threads_per_rank(1, {"OMP_NUM_THREADS": "1"}) == 1
    assert threads_per_rank(2, {"OMP_NUM_THREADS": "many"}) == 4


@pytest.mark.parametrize(
    ("environment", "ranks", "how"),
    [
        ({}, 8, "--nproc-per-node"),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "LOCAL_WORLD_SIZE": "8"},
            32,
            "2 x 8: sbatch --nodes=4",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "LOCAL_WORLD_SIZE": "8"},
            4,
            "with NPROC_PER_NODE",
        ),
    ],
)
def test_ranks_that_a_layout_wants_are_asked_for_where_they_come_from(
    environment: dict[str, str], ranks: int, how: str
) -> None:
    assert how_to_start(ranks, {**environment, "LOCAL_WORLD_SIZE": "8"}).endswith(how)


def test_rendezvous_host_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    launch = Launch(0, 2, 0, 2, "this-machine", 15000)
    assert process_groups.reachable_master(launch) == "127.0.0.1"
    with pytest.raises(PlatformError, match="MASTER_ADDR=node-a cannot be resolved"):
        process_groups.reachable_master(Launch(0, 2, 0, 1, "node-a", 15000))
    assert process_groups._interface_towards("node-a") is None


class _Backend:
    """What joining a world asks of an accelerator."""

    def __init__(self, collective_backend: str) -> None:
        self.collective_backend = collective_backend


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_restarted_ranks_do_not_read_what_the_dead_ones_wrote(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, given = torch.distributed.HashStore(), {}
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *_, **__: store)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: given.update(options))
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        launch = Launch(0, 2, 0, 2, "127.0.0.1", 29500)
        process_groups._join_world(launch, _Backend(backend), timedelta(seconds=1))  # type: ignore[arg-type]
        assert not given["store"].check(["address"])
        given["store"].set("address", restarts)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_gloo_groups_beside_nccl_take_the_interface_that_reaches_the_master(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(process_groups, "choose_interface", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    launch = Launch(0, 2, 0, 1, "127.0.0.1", 29500)
    process_groups._join_world(launch, _Backend(backend), timedelta(seconds=1))  # type: ignore[arg-type]
    assert chosen == ["127.0.0.1"]


@pytest.mark.skipif(not os.path.isdir("/sys/class/net/lo"), reason="asks for Linux's loopback device")
def test_interface_is_the_one_that_reaches_the_host() -> None:
    assert process_groups._interface_towards("127.0.0.1") == "lo"


def _layout(groups: ProcessGroups) -> dict[str, object]:
    total = torch.tensor([float(groups.rank)])
    torch.distributed.all_reduce(total, group=groups.collection.mp)
    return {
        "tp": groups.tensor_model_parallel_rank,
        "pp": groups.pipeline_model_parallel_rank,
        "cp": groups.context_parallel_rank,
        "dp": groups.data_parallel_rank,
        "ep": (groups.expert_model_parallel_rank, groups.expert_model_parallel_size),
        "size": (
            groups.tensor_model_parallel_size,
            groups.pipeline_model_parallel_size,
            groups.data_parallel_size,
        ),
        "stage": (groups.is_pipeline_first_stage, groups.is_pipeline_last_stage),
        "main": (groups.is_main_process, process_groups.is_main_process()),
        "model parallel sum": total.item(),
        "device": str(groups.device),
        "threads": torch.get_num_threads(),
    }


def test_ranks_are_laid_out_tensor_first_then_data_then_pipeline(ranks: RankPool) -> None:
    tp_pp = ranks.run(
        _layout,
        world_size=4,
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    )
    assert [(rank["tp"], rank["pp"], rank["dp"]) for rank in tp_pp] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (1, 1, 0),
    ]
    assert all(rank["size"] == (2, 2, 1) and rank["model parallel sum"] == 6.0 for rank in tp_pp)
    assert [rank["stage"] for rank in tp_pp] == [(True, False)] * 2 + [(False, True)] * 2
    assert [rank["main"] for rank in tp_pp] == [(True, True)] + [(False, False)] * 3
    assert all(rank["device"] == "cpu" and rank["threads"] == 1 for rank in tp_pp)

    tp_dp = ranks.run(_layout, world_size=4, parallel=ParallelConfig(tensor_model_parallel_size=2))
    assert [(rank["tp"], rank["dp"]) for rank in tp_dp] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_context_ranks_are_neighbours_and_experts_spread_over_data_and_context_ranks(ranks: RankPool) -> None:
    layout = ranks.run(
        _layout,
        world_size=4,
        parallel=ParallelConfig(context_parallel_size=2, expert_model_parallel_size=4),
    )
    assert [(rank["cp"], rank["dp"]) for rank in layout] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [rank["ep"] for rank in layout] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def _sum_over_slices_and_replicas(groups: ProcessGroups) -> tuple[float, str]:
    value = torch.tensor([float(groups.rank)]) if groups.is_pipeline_last_stage else torch.zeros(1)
    return groups.sum_from_last_stage(value).item(), groups.describe()


def test_sums_of_the_last_stage_are_over_slices_and_replicas(ranks: RankPool) -> None:
    split = ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2)
    staged = ParallelConfig(context_parallel_size=2, pipeline_model_parallel_size=2)
    unstaged = ranks.run(_sum_over_slices_and_replicas, world_size=4, parallel=split)
    assert [value for value, _ in unstaged] == [0 + 1 + 2 + 3] * 4
    assert "x context 2 x data 2; experts over 2 ranks" in unstaged[0][1]
    of_last_stage = ranks.run(_sum_over_slices_and_replicas, world_size=4, parallel=staged)
    assert [value for value, _ in of_last_stage] == [2 + 3] * 4


def _without_a_launcher() -> tuple[int, bool, str]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    for _ in range(2):  # a second world after the first one is left
        groups = process_groups.initialize(ParallelConfig(), detect("cpu"), seed=3)
        torch.distributed.all_reduce(torch.ones(1), group=groups.collection.dp)
        process_groups.destroy()
    process_groups.destroy()
    return groups.world_size, process_groups.is_main_process(), groups.describe()


def test_one_process_needs_no_launcher(ranks: RankPool) -> None:
    [(world_size, is_main, line)] = ranks.run(_without_a_launcher, world_size=1)
    assert world_size == 1 and is_main
    assert line == "1 rank(s) = tensor 1 x pipeline 1 x data 1, 1 CPU thread(s) each"


def _refused_world() -> tuple[str, bool]:
    with pytest.raises(ConfigurationError) as caught:
        process_groups.initialize(ParallelConfig(tensor_model_parallel_size=4), detect("cpu"), seed=0)
    return str(caught.value), torch.distributed.is_initialized()


def test_refusal_comes_before_any_group_forms(ranks: RankPool) -> None:
    for sentence, joined in ranks.run(_refused_world, world_size=2):
        assert "world size 2" in sentence and not joined


def _random_numbers(groups: ProcessGroups) -> tuple[float, float]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        in_model = torch.rand(1).item()
    return in_model, torch.rand(1).item()


def test_seeds_follow_megatrons_rule(ranks: RankPool) -> None:
    """Tensor-parallel ranks differ inside the tracker's fork and agree outside; runs repeat themselves."""
    tensor = ParallelConfig(tensor_model_parallel_size=2)
    first = ranks.run(_random_numbers, world_size=2, parallel=tensor)
    assert first == ranks.run(_random_numbers, world_size=2, parallel=tensor)
    assert first[0][0] != first[1][0] and first[0][1] == first[1][1]
    replicas = ranks.run(_random_numbers, world_size=2, parallel=ParallelConfig())
    assert replicas[0] == replicas[1]
    stages = ranks.run(_random_numbers, world_size=2, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    assert stages[0] != stages[1]
