"""Which rank holds the others up: a slow GPU, a hot node, a disk that is late."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from spikingbrain_train.ops.host_numbers import on_device
from spikingbrain_train.planning.launch import Launch, available_cores
from spikingbrain_train.training.alert import Alert
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report
from spikingbrain_train.training.step_times import PassTime, PassTimer

if TYPE_CHECKING:
    from spikingbrain_train.training.stages.losses import StepLosses

_MEASURED = 5
"""Steps in front of every report whose passes are timed, the reported one among them."""
_WINDOW = 10
"""Timed passes whose median is compared; a pause of one of them, or of four, is no slow rank."""


@dataclass(frozen=True)
class RankTime:
    """What a rank says of its passes."""

    rank: int
    peers: tuple[int, int]
    """Pipeline stage and part of the sequence: ranks that agree in both have the same to compute."""
    computing: float
    """Seconds of a step, median of the window."""
    waiting: float


@dataclass(frozen=True)
class Outlier:
    """A rank beside its peers."""

    time: RankTime
    usual: float
    """Median of what its peers compute, itself left out; its own where it has none."""

    @property
    def factor(self) -> float:
        """How many times its peers' time it takes."""
        return self.time.computing / self.usual if self.usual > 0 else 1.0


def beside_peers(times: Sequence[RankTime]) -> list[Outlier]:
    """Every rank beside those that have the same to compute."""
    of_peers: dict[tuple[int, int], list[RankTime]] = {}
    for each in times:
        of_peers.setdefault(each.peers, []).append(each)
    found = []
    for each in times:
        others = [other.computing for other in of_peers[each.peers] if other is not each]
        found.append(Outlier(each, median(others) if others else each.computing))
    return found


class SlowRanks(Callback):
    """Reports what ranks compute and wait, and names those that compute ``cluster.slow_rank_factor`` longer.

    Ranks wait for each other, so all steps take as long as those of the slowest; what tells it from the
    others is that it waits least. As ``train/compute_seconds`` (median of ranks),
    ``train/compute_seconds_slowest`` and ``train/slowest_rank`` (the furthest above its peers) and
    ``train/communication_seconds`` (median of ranks). One gather a report, no host that waits in between.
    """

    def __init__(self) -> None:
        self._window: deque[PassTime] = deque(maxlen=_WINDOW)
        self._slow: set[int] = set()
        self._suspected: set[int] = set()
        self._has_warmed_up = False

    def start(self) -> None:
        threads = Launch.from_environment().local_world_size * torch.get_num_threads()
        # Also where each has one: whatever else runs takes it from one or another.
        self._timer = PassTimer(self.run.groups.device, shares_cores=threads >= available_cores())

    @property
    def _factor(self) -> float | None:
        return self.run.config.cluster.slow_rank_factor

    def step_begin(self) -> None:
        if self._factor is None:
            return
        config, step = self.run.config, self.run.state.iteration + 1
        interval = config.logging.log_interval
        until_report = min(-step % interval, config.stage.train_iters - step)
        if until_report < _MEASURED:
            self._timer.begin()

    def vote(self, losses: StepLosses) -> int:
        self._timer.end()
        return 0

    def report_due(self, report: Report) -> None:
        if self._factor is None:
            return
        passes = self._timer.take()
        self._window.extend(passes)
        compared = beside_peers(self._gathered())
        report.add("train/compute_seconds", median(each.time.computing for each in compared))
        slowest = max(compared, key=lambda each: each.factor)
        report.add("train/compute_seconds_slowest", slowest.time.computing)
        report.add("train/slowest_rank", float(slowest.time.rank))
        report.add("train/communication_seconds", median(each.time.waiting for each in compared))
        if not self._has_warmed_up:  # the first steps build and tune kernels, each rank at its own time
            self._has_warmed_up = True
            self._window.clear()
        elif len(self._window) >= _MEASURED:
            self._judge(compared, self._factor)

    def _gathered(self) -> list[RankTime]:
        groups = self.run.groups
        own = [
            float(groups.pipeline_model_parallel_rank),
            float(groups.context_parallel_rank),
            median(each.computing for each in self._window),
            median(each.waiting for each in self._window),
        ]
        mine = on_device(own, groups.device, torch.float64)
        every = torch.zeros(groups.world_size, len(own), dtype=torch.float64, device=groups.device)
        every[groups.rank] = mine
        torch.distributed.all_reduce(every)
        return [
            RankTime(rank, (int(stage), int(part)), computing, waiting)
            for rank, (stage, part, computing, waiting) in enumerate(every.tolist())
        ]

    def _judge(self, compared: Sequence[Outlier], factor: float) -> None:
        """Say who is slow for the second report in a row, and who no longer is; all ranks come to the same.

        Not at the first: what else runs on a host may hold a rank up for some steps.
        """
        above = {each.time.rank: each for each in compared if each.factor >= factor}
        for rank, each in above.items():
            if rank in self._suspected and rank not in self._slow:
                self._name(each)
        for rank in sorted(self._slow - set(above)):
            self.run.say(f"rank {rank} computes as fast as its peers again")
        self._slow = set(above) & (self._slow | self._suspected)
        self._suspected = set(above)

    def _name(self, slow: Outlier) -> None:
        host = self._host_of(slow.time.rank)
        own, usual = f"{slow.time.computing:.3g} s", f"{slow.usual:.3g} s"
        text = (
            f"rank {slow.time.rank} on {host} computes {own} a step, {slow.factor:.2f} times the median of "
            f"its peers ({usual}), and all ranks wait for it; look at its device's clocks and temperature, "
            "at what else runs there, and at its disk"
        )
        step = self.run.state.iteration
        self.run.say(f"warning: iteration {step}: {text} (cluster.slow_rank_factor={self._factor:g})")
        self.run.callbacks.alert(Alert("slow rank", f"iteration {step}: {text}"))

    def _host_of(self, rank: int) -> str:
        host = [platform.node()]
        torch.distributed.broadcast_object_list(host, src=rank, device=self.run.groups.device)
        return host[0]

    def end(self, error: BaseException | None) -> None:
        if error is not None:
            self._timer.end()
