"""What is out of line among the hosts of a run, in a sentence each, and the table of them. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from spikingbrain_train.health.bandwidth import Exchanged, Speeds
from spikingbrain_train.health.facts import HostFacts, Need, RankFacts
from spikingbrain_train.planning.memory import GIB

GB = 1e9
_FREE_SHARE_OF_GPU = 0.9
"""Less of a GPU is free only where another process is on it; the driver itself takes a percent."""


@dataclass(frozen=True)
class Limits:
    """What still counts as in line."""

    clock_seconds: float = 2.0
    slow_factor: float = 2.0
    """A host that is so many times slower than the median is named."""
    bandwidth: float | None = None
    """Bytes per second of the all-reduce over all ranks, at least."""


@dataclass(frozen=True)
class Seen:
    """All that has been told."""

    world_size: int
    local_world_size: int
    ranks: Mapping[int, RankFacts]
    speeds: Mapping[int, Speeds]
    hosts: Sequence[str] = ()
    """Names of the nodes, as the scheduler knows them."""

    def host(self, node: int) -> str:
        """What a node is called."""
        for facts in self.ranks.values():
            if facts.node == node:
                return facts.host
        return self.hosts[node] if node < len(self.hosts) else f"node {node}"

    @property
    def nodes(self) -> list[int]:
        """Counted from 0, in the order of ranks."""
        return list(range(self.world_size // self.local_world_size))

    def on_hosts(self) -> dict[int, HostFacts]:
        """Node -> what is known of it."""
        return {f.node: f.on_host for f in self.ranks.values() if f.on_host is not None}


def absent(seen: Seen, told: Mapping[int, object], what: str) -> list[str]:
    """A sentence for each host of which not all ranks have told something."""
    sentences = []
    for node in seen.nodes:
        first = node * seen.local_world_size
        missing = [rank for rank in range(first, first + seen.local_world_size) if rank not in told]
        if missing:
            host = seen.host(node)
            how = f" (sbatch --exclude={host})" if seen.hosts else ""
            sentences.append(
                f"rank{'s' if len(missing) > 1 else ''} {_listed(missing)} on {host} {what}; see what "
                f"its log says, or leave the node out{how}"
            )
    return sentences


def behind(seen: Seen, told: Mapping[int, Exchanged]) -> list[str]:
    """A sentence for each host whose ranks keep the others from getting through the exchange.

    Who hangs or is gone takes the others along. A rank that has told nothing is the one; else who still
    waits where others have given up; among ranks that all wait, as on GPUs, those that have come least far:
    hosts exchange among their own ranks first.
    """
    failed = {rank: exchanged for rank, exchanged in told.items() if exchanged.speeds is None}
    innocent: Mapping[int, object] = told
    if len(told) == seen.world_size:
        hanging = {rank: exchanged for rank, exchanged in failed.items() if exchanged.hangs}
        suspects = hanging or failed
        least = min((exchanged.reached for exchanged in suspects.values()), default=0)
        suspects = {rank: exchanged for rank, exchanged in suspects.items() if exchanged.reached == least}
        innocent = {rank: exchanged for rank, exchanged in told.items() if rank not in suspects}
    if told and not innocent:
        return [
            "no rank got through the exchange of tensors; NCCL_DEBUG=INFO says where it stops, and a larger "
            "--timeout gives it longer"
        ]
    return absent(seen, innocent, "did not get through the exchange of tensors")


def _listed(ranks: Sequence[int]) -> str:
    whole = len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def of_facts(seen: Seen, need: Need, limits: Limits) -> list[str]:
    """What is out of line before anything is exchanged."""
    return [
        *_gpus(seen, need),
        *_memory(seen),
        *_disk(seen, need),
        *(facts.trouble_with_network for facts in seen.on_hosts().values() if facts.trouble_with_network),
        *_clocks(seen, limits),
        *_versions(seen),
    ]


def _gpus(seen: Seen, need: Need) -> list[str]:
    # Where the hosts choose by themselves (accelerator auto), that of rank 0 may be the one without.
    if not need.on_gpus and not any(facts.device_total for facts in seen.ranks.values()):
        return []
    sentences = []
    for node in seen.nodes:
        here = [facts for facts in seen.ranks.values() if facts.node == node]
        if any(not facts.device and not facts.trouble_with_device for facts in here):
            sentences.append(
                f"{seen.host(node)} shows {min(facts.gpus_seen for facts in here)} of the "
                f"{seen.local_world_size} GPUs that its ranks need; start fewer ranks a "
                "node, or leave the node out"
            )
    usual = Counter(facts.device for facts in seen.ranks.values() if facts.device).most_common(1)
    for facts in seen.ranks.values():
        if facts.trouble_with_device:
            sentences.append(
                f"the GPU of rank {facts.rank} on {facts.host} cannot be used ({facts.trouble_with_device}); "
                "end the process that holds it, or leave the node out"
            )
        if not facts.device:
            continue
        if facts.device != usual[0][0]:
            sentences.append(
                f"rank {facts.rank} on {facts.host} has a {facts.device}, most have {usual[0][0]}; ask for "
                "nodes of one kind (sbatch --constraint)"
            )
        free, total = facts.device_free, facts.device_total
        if free < _FREE_SHARE_OF_GPU * total:
            wants = f"; the run takes about {_gib(need.device_bytes)}" if need.device_bytes else ""
            sentences.append(
                f"the GPU of rank {facts.rank} on {facts.host} has {_gib(free)} of {_gib(total)} free"
                f"{wants}; end the process that holds the rest, or leave the node out"
            )
    return sentences


def _memory(seen: Seen) -> list[str]:
    free = {node: facts.memory_free for node, facts in seen.on_hosts().items()}
    return [
        f"{seen.host(node)} has {_gib(free[node])} of memory free, the others about {_gib(usual)}; end what "
        "runs there beside this job, or leave the node out"
        for node, usual in _below(free, 2.0)
    ]


def _disk(seen: Seen, need: Need) -> list[str]:
    sentences = []
    for node, facts in seen.on_hosts().items():
        host, folder = seen.host(node), f"output_dir={need.output_dir}"
        if facts.trouble_with_output:
            sentences.append(
                f"{host} cannot write to {folder} ({facts.trouble_with_output}); change its "
                "permissions or quota, or choose another folder"
            )
        elif not facts.sees_output_of_rank_0:
            sentences.append(
                f"{host} does not see what {seen.host(0)} writes to {folder}; choose a folder on a file "
                "system that all nodes share"
            )
        elif facts.disk_free < need.checkpoint_bytes:
            sentences.append(
                f"{folder} has {_gib(facts.disk_free)} of free space on {host}, but one checkpoint of "
                f"this run takes {_gib(need.checkpoint_bytes)}; free some or choose another folder"
            )
    return sentences


def _clocks(seen: Seen, limits: Limits) -> list[str]:
    clocks = {facts.node: facts.clock_seconds for facts in seen.ranks.values() if facts.on_host}
    # Of two clocks nobody knows which one is right.
    usual = median(clocks.values()) if len(clocks) > 2 else 0.0
    sentences = []
    for node, clock in clocks.items():
        off = clock - usual
        if abs(off) > limits.clock_seconds:
            others = "the others" if len(clocks) > 2 else seen.host(0)
            sentences.append(
                f"the clock of {seen.host(node)} is {abs(off):,.1f} s {'ahead of' if off > 0 else 'behind'} "
                f"{others}; set it (chronyc makestep), or leave the node out"
            )
    return sentences


def _versions(seen: Seen) -> list[str]:
    on_hosts = seen.on_hosts()
    sentences = []
    for name in dict.fromkeys(name for facts in on_hosts.values() for name in facts.versions):
        found = {node: facts.versions.get(name, "none") for node, facts in on_hosts.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        for node, version in found.items():
            if version != usual:
                sentences.append(
                    f"{seen.host(node)} has {name} {version}, the others {usual}; start all hosts from one "
                    "checkout and environment"
                )
    return sentences


def of_speeds(seen: Seen, limits: Limits) -> list[str]:
    """What is out of line in what ranks have exchanged."""
    sentences = []
    for ask, what in (
        (lambda speeds: speeds.in_host, "among its own ranks"),
        (lambda speeds: speeds.between_hosts, "with its neighbours"),
    ):
        found = _per_node(seen, ask)
        sentences += [
            f"{seen.host(node)} exchanges {found[node] / GB:,.2f} GB/s {what}, the others about "
            f"{usual / GB:,.2f}; look at its links, or leave the node out"
            for node, usual in _below(found, limits.slow_factor)
        ]
    world = [speeds.world for speeds in seen.speeds.values() if speeds.world is not None]
    if limits.bandwidth is not None and world and min(world) < limits.bandwidth:
        sentences.append(
            f"the all-reduce over all ranks reaches {min(world) / GB:,.2f} GB/s, and --min-bandwidth asks "
            f"for {limits.bandwidth / GB:,.2f}; NCCL_DEBUG=INFO says over which network it goes"
        )
    return sentences


def _per_node(seen: Seen, ask: Callable[[Speeds], float | None]) -> dict[int, float]:
    """Node -> the lowest of its ranks."""
    found: dict[int, float] = {}
    for rank, speeds in seen.speeds.items():
        speed = ask(speeds)
        if speed is not None:
            node = rank // seen.local_world_size
            found[node] = min(speed, found.get(node, speed))
    return found


def _below(values: Mapping[int, float], factor: float) -> list[tuple[int, float]]:
    """Keys whose value is so many times below the median of the others, with that median."""
    found = []
    for key, value in values.items():
        others = [other for node, other in values.items() if node != key]
        if others and value * factor < median(others):
            found.append((key, median(others)))
    return found


def table(seen: Seen) -> str:
    """A line a host."""
    heads = (
        "host",
        "ranks",
        "device",
        "GPU free",
        "memory free",
        "disk free",
        "clock",
        "in host",
        "neighbours",
    )
    in_host = _per_node(seen, lambda speeds: speeds.in_host)
    between = _per_node(seen, lambda speeds: speeds.between_hosts)
    rows = [heads]
    for node in seen.nodes:
        first, last = node * seen.local_world_size, (node + 1) * seen.local_world_size - 1
        here = [facts for facts in seen.ranks.values() if facts.node == node]
        on_host = seen.on_hosts().get(node)
        leader = next((facts for facts in here if facts.on_host is not None), None)
        devices = Counter(facts.device or "no GPU" for facts in here)
        gpus = [facts.device_free for facts in here if facts.device_total]
        rows.append(
            (
                seen.host(node),
                f"{first}-{last}" if last > first else f"{first}",
                ", ".join(f"{count} x {name}" for name, count in devices.items()) or "-",
                _gib(min(gpus)) if gpus else "-",
                _gib(on_host.memory_free) if on_host else "-",
                _gib(on_host.disk_free) if on_host else "-",
                f"{leader.clock_seconds:+.3f} s" if leader else "-",
                f"{in_host[node] / GB:,.2f} GB/s" if node in in_host else "-",
                f"{between[node] / GB:,.2f} GB/s" if node in between else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
