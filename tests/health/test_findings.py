"""Hosts that are out of line are named, each in one sentence, and the others are not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.commands.health_check import parse_words
from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.health import facts, findings
from spikingbrain_train.health.bandwidth import IN_HOST, LEAVING, WORLD, Exchanged, Speeds, partners
from spikingbrain_train.health.facts import HostFacts, Need, RankFacts
from spikingbrain_train.health.findings import Limits, Seen
from spikingbrain_train.health.slurm_step import launch_of_step
from spikingbrain_train.planning.launch import Launch
from spikingbrain_train.planning.memory import GIB

HOSTS, LOCAL = ("host-a", "host-b", "host-c"), 2
NEED = Need("outputs/run", AcceleratorKind.cuda, checkpoint_bytes=10 * GIB, device_bytes=60 * GIB)


def _cluster() -> Seen:
    """Three hosts of two GPUs that are as they should be."""
    on_host = HostFacts(900 * GIB, 1000 * GIB, 500 * GIB, "", True, {"torch": "2.7.0", "commit": "0123abc"})
    ranks = {
        rank: RankFacts(
            *(rank, rank // LOCAL, HOSTS[rank // LOCAL], "H100", LOCAL, 79 * GIB, 80 * GIB),
            on_host=on_host if rank % LOCAL == 0 else None,
            clock_seconds=0.01 * rank if rank % LOCAL == 0 else 0.0,
        )
        for rank in range(len(HOSTS) * LOCAL)
    }
    speeds = {rank: Speeds(90e9, 200e9, 45e9 if rank % LOCAL == 0 else None) for rank in ranks}
    return Seen(len(ranks), LOCAL, ranks, speeds, HOSTS)


def _sentences(seen: Seen, limits: Limits | None = None) -> list[str]:
    limits = limits or Limits()
    return [
        *findings.absent(seen, seen.ranks, "did not come within 60 s"),
        *findings.of_facts(seen, NEED, limits),
        *findings.of_speeds(seen, limits),
    ]


def _with(rank: int, *, host: dict | None = None, **changes) -> Seen:
    seen = _cluster()
    told = seen.ranks[rank]
    if host is not None:
        assert told.on_host is not None
        changes["on_host"] = replace(told.on_host, **host)
    return replace(seen, ranks={**seen.ranks, rank: replace(told, **changes)})


def test_hosts_that_are_alike_pass_and_have_a_line_each() -> None:
    seen = _cluster()
    assert _sentences(seen) == []
    lines = findings.table(seen).splitlines()
    assert [line.split()[0] for line in lines] == ["host", *HOSTS]
    assert "2 x H100" in lines[2] and "79.0 GiB" in lines[2] and "200.00 GB/s" in lines[2]


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (_with(3, device="", gpus_seen=1), "host-b shows 1 of the 2 GPUs"),
        (
            _with(3, device="", trouble_with_device="CUDA error: busy"),
            "the GPU of rank 3 on host-b cannot be",
        ),
        (_with(3, device="A100"), "rank 3 on host-b has a A100, most have H100"),
        (_with(5, device_free=50 * GIB), "the GPU of rank 5 on host-c has 50.0 GiB of 80.0 GiB free"),
        (_with(2, host={"memory_free": 300 * GIB}), "host-b has 300.0 GiB of memory free, the others about"),
        (_with(4, host={"disk_free": 9 * GIB}), "output_dir=outputs/run has 9.0 GiB of free space on host-c"),
        (_with(4, host={"trouble_with_output": "Permission denied"}), "host-c cannot write to output_dir="),
        (
            _with(2, host={"trouble_with_network": "NCCL_SOCKET_IFNAME=ib7 names none; unset"}),
            "NCCL_SOCKET_IFNAME=ib7",
        ),
        (_with(2, host={"sees_output_of_rank_0": False}), "host-b does not see what host-a writes"),
        (_with(4, clock_seconds=-42.0), "the clock of host-c is 42.0 s behind the others"),
        (_with(0, host={"versions": {"torch": "2.6.0", "commit": "0123abc"}}), "host-a has torch 2.6.0"),
        (_with(2, host={"versions": {"torch": "2.7.0"}}), "host-b has commit none, the others 0123abc"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_out_of_line_is_named_in_one_sentence_that_says_what_to_do(seen: Seen, says: str) -> None:
    (sentence,) = _sentences(seen)
    assert sentence.startswith(says) and ";" in sentence


def test_a_host_whose_gpus_have_gone_is_named_also_where_rank_0_is_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(facts, "has_gpu_device", lambda: False)  # as its system shows them
    seen = _with(0, device="cpu", device_free=0, device_total=0)
    (sentence,) = findings.of_facts(seen, Need(accelerator=AcceleratorKind.auto), Limits())
    assert sentence.startswith("rank 0 on host-a has a cpu, most have H100")


def test_a_gpu_that_cannot_be_used_is_told_by_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_device: int) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    told = facts.rank_facts(Launch(1, 2, 1, 2), NEED)
    assert (told.device, told.gpus_seen) == ("", 2)
    assert told.trouble_with_device == "CUDA error: out of memory"


def test_a_folder_that_is_closed_is_trouble_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(facts, "_SEEN_WITHIN", 0.0)
    # As for a user who is not root, whom nothing is closed to.
    monkeypatch.setattr(os, "listdir", forbid)
    monkeypatch.setattr(Path, "is_dir", forbid)
    monkeypatch.setattr(Path, "write_bytes", forbid)
    on_host = facts.rank_facts(Launch(), Need(str(closed / "run"), AcceleratorKind.cpu, token="left")).on_host
    assert on_host is not None and on_host.trouble_with_output == "Permission denied"


def test_the_clock_of_rank_0_is_named_where_it_is_the_one_that_is_wrong() -> None:
    seen = _cluster()
    ahead = {rank: replace(told, clock_seconds=-7.0) for rank, told in seen.ranks.items() if rank in (2, 4)}
    (sentence,) = _sentences(replace(seen, ranks={**seen.ranks, **ahead}))
    assert sentence.startswith("the clock of host-a is 7.0 s ahead of the others")


def test_ranks_that_do_not_come_are_named_with_their_host() -> None:
    seen = _cluster()
    without = replace(seen, ranks={rank: told for rank, told in seen.ranks.items() if rank not in (1, 4, 5)})
    one, host = findings.absent(without, without.ranks, "did not come within 60 s")
    assert one.startswith("rank 1 on host-a did not come within 60 s")
    assert host.startswith("ranks 4, 5 on host-c did not come") and "--exclude=host-c" in host
    # Without a scheduler there is no name of a host that nobody came from, nor an option of sbatch.
    _, nameless = findings.absent(replace(without, hosts=()), without.ranks, "did not come within 60 s")
    assert nameless.startswith("ranks 4, 5 on node 2 did not") and nameless.endswith("leave the node out")
    assert findings.table(without).splitlines()[3].split()[:3] == ["host-c", "4-5", "-"]


def test_a_slow_link_is_named_by_its_host_and_a_slow_network_by_its_number() -> None:
    seen = _cluster()
    slow = {**seen.speeds, 3: Speeds(90e9, 80e9), 4: Speeds(90e9, 200e9, 20e9)}
    inside, between = _sentences(replace(seen, speeds=slow))
    assert inside.startswith("host-b exchanges 80.00 GB/s among its own ranks, the others about 200.00")
    assert between.startswith("host-c exchanges 20.00 GB/s with its neighbours, the others about 45.00")
    assert _sentences(replace(seen, speeds=slow), Limits(slow_factor=3.0)) == []
    (whole,) = _sentences(seen, Limits(bandwidth=100e9))
    assert "reaches 90.00 GB/s, and --min-bandwidth asks for 100.00" in whole


@pytest.mark.parametrize("nodes", [3, 4, 5, 8])
def test_neighbours_meet_in_the_same_round_and_each_host_has_two(nodes: int) -> None:
    asked = {node: partners(node, nodes) for node in range(nodes)}
    for node, pairs in asked.items():
        assert len(pairs) == 2 and all(node in pair for pair in pairs)
        for first, second in pairs:
            assert (first, second) in asked[first] and (first, second) in asked[second]
    # No circle of hosts that wait for each other: all take pairs in one order.
    order = {pair: (pair == (0, nodes - 1), pair[0] % 2) for pairs in asked.values() for pair in pairs}
    assert all(
        [order[pair] for pair in pairs] == sorted(order[pair] for pair in pairs) for pairs in asked.values()
    )


def _named(ranks: dict[int, Exchanged | None]) -> list[int]:
    """Hosts that are named for ranks that came through the exchange so; all others came through it."""
    seen = _cluster()
    through = dict.fromkeys(seen.ranks, Exchanged(Speeds(90e9), LEAVING))
    sentences = findings.behind(seen, {rank: told for rank, told in {**through, **ranks}.items() if told})
    assert all("did not get through the exchange" in s or s.startswith("no rank got") for s in sentences)
    return [node for node, host in enumerate(HOSTS) if any(f"on {host} " in s for s in sentences)]


def test_of_ranks_that_hang_together_the_host_that_holds_the_others_up_is_named() -> None:
    gave_up, everyone = Exchanged(None, WORLD), range(6)
    # gloo: who waits in vain gives up, who hangs does not; a process that is stopped says nothing.
    assert _named({**dict.fromkeys(everyone, gave_up), 3: Exchanged(None, WORLD, True)}) == [1]
    assert _named({**dict.fromkeys(everyone, gave_up), 4: None}) == [2]
    assert _named({2: gave_up}) == [1]
    # NCCL: all hang with it. It has come less far, or its host has, whose ranks go first.
    hang = Exchanged(None, WORLD, True)
    assert _named({**dict.fromkeys(everyone, hang), 1: Exchanged(None, 0, True)}) == [0]
    inside = dict.fromkeys((2, 3), Exchanged(None, IN_HOST, True))
    assert _named({**dict.fromkeys(everyone, hang), **inside}) == [1]
    assert _named(dict.fromkeys(everyone, hang)) == []


def test_a_task_of_srun_is_a_rank_and_a_launchers_rank_stays_what_it_is() -> None:
    task = {
        **{"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "31007"},
        **{"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
        "MASTER_ADDR": "host-a",
    }
    assert launch_of_step(task) == {
        **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "host-a", "MASTER_PORT": "16007"},
    }
    assert launch_of_step({**task, "RANK": "0"}) == launch_of_step({"SLURM_JOB_ID": "31007"}) == {}
    # --distribution=cyclic deals the tasks out in turns: ranks are counted node by node all the same.
    dealt = [
        launch_of_step(
            {**task, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i % 2), "SLURM_LOCALID": str(i // 2)}
        )
        for i in range(8)
    ]
    ranks = [Launch.from_environment(variables).rank for variables in dealt]
    assert ranks == [0, 4, 1, 5, 2, 6, 3, 7]
    for changes, sentence in (
        (
            {"SLURM_STEP_TASKS_PER_NODE": "5,3"},
            r"has started 8 tasks on 2 nodes \(5,3\), .* --ntasks-per-node",
        ),
        ({"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": ""}, "8 tasks on 3 nodes .not as many"),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID= and SLURM_LOCALID=1 do not say which rank this task is"),
    ):
        with pytest.raises(PlatformError, match=sentence):
            launch_of_step({**task, **changes})


def test_words_of_the_run_keep_their_order_whatever_they_look_like() -> None:
    words = ["--config", "a/run_config.yaml", "--timeout", "60", "optimizer.lr=1e-4", "--min-bandwidth=40"]
    parsed = parse_words(words)
    assert parsed.settings == ["--config", "a/run_config.yaml", "optimizer.lr=1e-4"]
    assert (parsed.timeout, parsed.min_bandwidth, parsed.slow_factor) == (60.0, 40.0, 2.0)
