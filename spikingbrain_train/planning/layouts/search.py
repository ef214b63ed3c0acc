"""The fastest layouts that fit: bounds of all times, then times and memory in their order. Without torch.

A time is some arithmetic, the memory of a run its whole plan, so the search asks for memory in the order of
times until it has as many as were asked for. A time is reckoned when what it is at least
(``step_time.least_time``) makes it the next one. It asks what plans and dry runs ask: the
checks of a run (planning/checks.py), the estimate of every stage (planning/memory.py) and the margin of a
device (planning/fit.py). Recomputing more and smaller micro-batches never take more memory, so one layout
that does not fit tells of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from spikingbrain_train.architecture.layers import unchanged_models
from spikingbrain_train.architecture.trained_weights import trains_in_part
from spikingbrain_train.config.parallel import EngineKind, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.fit import DeviceMemory, Fit, device_memory
from spikingbrain_train.planning.layer_work import ModelWork
from spikingbrain_train.planning.layouts.layout import Layout, Runs
from spikingbrain_train.planning.layouts.space import Rejections, layouts
from spikingbrain_train.planning.memory import GIB, estimate_memory
from spikingbrain_train.planning.planner import Plan, plan_run
from spikingbrain_train.planning.precision import expected_precision
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.planning.step_time import StepTime, least_time, peak_flops, step_time
from spikingbrain_train.planning.topology import Network
from spikingbrain_train.reporting.activity import activity

_LEVELS = list(Recompute)


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    layout: Layout
    plan: Plan
    time: StepTime

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.plan.tokens_per_step / self.time.seconds / self.plan.world_size


@dataclass(frozen=True)
class Smallest:
    """The layout that takes least, where none fits."""

    layout: Layout
    bytes: float


@dataclass(frozen=True)
class Search:
    """What a search has found on a number of GPUs."""

    config: RunConfig
    """The run that layouts were sought for."""
    world_size: int
    device: DeviceMemory
    found: list[Found]
    """The fastest first, of each split (tensor, pipeline, context, expert degree) its fastest form; empty
    where nothing fits."""
    tried: int
    """Layouts that a run accepts."""
    slower: int
    """Of these, what is slower than those found, and was asked no further."""
    rejections: Rejections
    smallest: Smallest | None
    """Where nothing fits; None where nothing can work, whatever memory there is."""


def check_search(config: RunConfig) -> RunConfig:
    """The run with its precision settled, if the search can judge it.

    Raises:
        ConfigurationError: its stage is none that trains everything on a token loss, or its cluster states no
            memory, peak or links.
    """
    kind, stage = kind_of(config.stage), config.stage
    if kind.needs_teacher(stage) or kind.trains_mixers or trains_in_part(config.model):
        why = "with frozen weights" if trains_in_part(config.model) else "with a teacher"
        raise ConfigurationError(
            f"stage.kind={stage.kind} {why} is none whose time is known; search with stage=cpt, without "
            "adapters and for all experts, and ask spikingbrain-plan whether the layout fits this stage"
        )
    peak_flops(config)
    Network.of(config.cluster)
    if device_memory(config.cluster, 1) is None:
        raise ConfigurationError(
            "cluster.memory_gib is null, so no layout can be told to fit; set it, or choose cluster=a800, "
            "h100, h200 or c550, which state it"
        )
    return replace(config, precision=expected_precision(config).precision)


def search(
    config: RunConfig,
    world_size: int,
    top: int,
    efficiency: float,
    work: ModelWork | None = None,
    engines: Sequence[EngineKind] = (EngineKind.megatron,),
    *,
    everything: bool = False,
) -> Search:
    """The ``top`` fastest layouts that fit.

    Args:
        config: a run of :func:`check_search`; its degrees and its micro-batch size do not count.
        world_size: GPUs.
        top: how many.
        efficiency: share of the peak that arithmetic reaches.
        work: of its model, from an earlier search with the same model and length.
        engines: that may train.
        everything: try what is never better, too.
    """
    with unchanged_models():
        work = ModelWork(config) if work is None else work
        return _search(config, world_size, top, efficiency, work, engines, everything=everything)


def _search(
    config: RunConfig,
    world_size: int,
    top: int,
    efficiency: float,
    work: ModelWork,
    engines: Sequence[EngineKind],
    *,
    everything: bool,
) -> Search:
    device = device_memory(config.cluster, world_size)
    assert device is not None  # check_search
    runs = Runs(config, world_size)
    times, rejections = _Times(work, runs, world_size, Network.of(config.cluster), efficiency), Rejections()
    with activity("reckoning the time of", unit="layouts") as progress:
        for layout in layouts(config, world_size, work, rejections, engines, everything=everything):
            progress.advance()
            try:
                times.add(layout)
            except ConfigurationError as error:
                rejections.refused(error)
    memory = _Memory(runs, world_size, device)
    found: list[Found] = []
    listed: set[tuple[int, ...]] = set()
    looked = slower_forms = 0
    with activity("asking for the memory of", times.number, "layouts") as progress:
        for layout, time in times.fastest_first():
            looked += 1
            progress.advance()
            if layout.degrees in listed:
                slower_forms += 1
                continue
            if memory.refuses(layout, rejections):
                continue
            run = replace(runs.of(layout), dry_run=True, dry_run_rank=0)
            try:
                check_run_config(run, world_size)
            except ConfigurationError as error:
                rejections.refused(error)
                continue
            found.append(Found(layout, plan_run(run, world_size), time))
            listed.add(layout.degrees)
            if len(found) == top:
                break
    slower = times.number - looked + slower_forms
    smallest = memory.smallest
    if found or (smallest is not None and device.fit(smallest.bytes) is Fit.fits):
        smallest = None
    return Search(config, world_size, device, found, times.number, slower, rejections, smallest)


class _Times:
    """Layouts by the time of a step, which is reckoned of those alone that may be the next."""

    def __init__(
        self, work: ModelWork, runs: Runs, world_size: int, network: Network, efficiency: float
    ) -> None:
        self._work, self._runs = work, runs
        self._cluster = world_size, network, efficiency
        self.number = 0
        """Layouts that were added."""
        self._waiting: list[tuple[float, int, int, Layout, StepTime | None]] = []

    def add(self, layout: Layout) -> None:
        """Raises ConfigurationError where its time cannot be known."""
        least = least_time(self._work, self._runs.of(layout), *self._cluster)
        self._waiting.append((round(least, 6), 0, self.number, layout, None))
        self.number += 1

    def fastest_first(self) -> Iterator[tuple[Layout, StepTime]]:
        """All of them with their times; of those that are equally fast the one with the fewest degrees."""
        heapify(self._waiting)
        while self._waiting:
            _, _, number, layout, time = heappop(self._waiting)
            if time is not None:
                yield layout, time
                continue
            time = step_time(self._work, self._runs.of(layout), *self._cluster)
            degrees = layout.tensor * layout.context + layout.pipeline + layout.expert
            heappush(self._waiting, (round(time.seconds, 6), degrees, number, layout, time))


class _Memory:
    """Whether layouts fit, asked as seldom as can be."""

    def __init__(self, runs: Runs, world_size: int, device: DeviceMemory) -> None:
        self._runs, self._world_size, self._device = runs, world_size, device
        self._too_large: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        self._probed: set[tuple[object, ...]] = set()
        self.smallest: Smallest | None = None

    def refuses(self, layout: Layout, rejections: Rejections) -> bool:
        """Whether it does not fit, with the reason."""
        known = self._too_large.setdefault(layout.split, [])
        level, size = _LEVELS.index(layout.recompute), layout.micro_batch_size
        if any(level <= other and size >= larger for other, larger in known):
            rejections.add(MEMORY, "")
            return True
        if layout.split not in self._probed:
            # The least that the split can take tells of all that it can.
            self._probed.add(layout.split)
            least = replace(layout, recompute=Recompute.full, micro_batch_size=1)
            if self._does_not_fit(least, rejections):
                known.append((_LEVELS.index(Recompute.full), 1))
                return True
            if least == layout:
                return False
        if self._does_not_fit(layout, rejections):
            known.append((level, size))
            return True
        return False

    def _does_not_fit(self, layout: Layout, rejections: Rejections) -> bool:
        needed = self._needed(layout)
        if self.smallest is None or needed < self.smallest.bytes:
            self.smallest = Smallest(layout, needed)
        fit = self._device.fit(needed)
        if fit is Fit.fits:
            return False
        rejections.add(
            MEMORY,
            f"{layout.describe(self._world_size)} with parallel.recompute={layout.recompute.name} and "
            f"micro-batches of {layout.micro_batch_size} takes {needed / GIB:.1f} GiB of "
            f"{self._device.bytes / GIB:.1f} a GPU, which is {_WORDS[fit]}",
        )
        return True

    def _needed(self, layout: Layout) -> float:
        """Bytes on the fullest rank."""
        run = self._runs.of(layout)
        sequences = run.stage.global_batch_size // layout.replicas(self._world_size)
        return max(
            estimate_memory(run, stage, self._world_size, sequences // layout.micro_batch_size).total
            for stage in range(layout.pipeline)
        )


MEMORY = "memory"
"""The group of rejections that are one of memory."""
_WORDS = {Fit.tight: "more than the nine tenths that may be planned", Fit.too_large: "too much"}
