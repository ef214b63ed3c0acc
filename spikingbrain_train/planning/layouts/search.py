"""The fastest layouts that fit: times of all, then memory from the fastest on. Without torch.

A time is some arithmetic, the memory of a run its whole plan, so the search reckons all times first and asks
for memory in their order until it has as many as were asked for. It asks what plans and dry runs ask: the
checks of a run (planning/checks.py), the estimate of every stage (planning/memory.py) and the margin of a
device (planning/fit.py). Recomputing more and smaller micro-batches never take more memory, so one layout
that does not fit tells of others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from spikingbrain_train.architecture.linear_transforms import freezes_base
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.fit import DeviceMemory, Fit, device_memory
from spikingbrain_train.planning.layer_work import ModelWork
from spikingbrain_train.planning.layouts.layout import Layout
from spikingbrain_train.planning.layouts.space import Rejections, layouts
from spikingbrain_train.planning.memory import GIB, estimate_memory
from spikingbrain_train.planning.planner import Plan, plan_run
from spikingbrain_train.planning.precision import expected_precision
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.planning.step_time import StepTime, peak_flops, step_time
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
    """Where nothing fits; None where nothing can work."""


def check_search(config: RunConfig) -> RunConfig:
    """The run with its precision settled, if the search can judge it.

    Raises:
        ConfigurationError: its stage is none that trains everything on a token loss, or its cluster states no
            memory, peak or links.
    """
    kind, stage = kind_of(config.stage), config.stage
    if kind.needs_teacher(stage) or kind.trains_mixers or freezes_base(config.model):
        why = "with adapters beside frozen weights" if freezes_base(config.model) else "with a teacher"
        raise ConfigurationError(
            f"stage.kind={stage.kind} {why} is none whose time is known; search with stage=cpt and without "
            "adapters, and ask spikingbrain-plan whether the layout fits this stage"
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
        everything: try what is never better, too.
    """
    work = ModelWork(config) if work is None else work
    device = device_memory(config.cluster, world_size)
    assert device is not None  # check_search
    network, rejections = Network.of(config.cluster), Rejections()
    timed: list[tuple[float, int, Layout, StepTime]] = []
    with activity("reckoning the time of", unit="layouts") as progress:
        for layout in layouts(config, world_size, work, rejections, everything=everything):
            progress.advance()
            try:
                time = step_time(work, layout.run(config, world_size), world_size, network, efficiency)
            except ConfigurationError as error:
                rejections.refused(error)
                continue
            # Of layouts that are equally fast the one with the fewest degrees.
            degrees = layout.tensor * layout.context + layout.pipeline + layout.expert
            timed.append((round(time.seconds, 6), degrees, layout, time))
    timed.sort(key=lambda each: each[:2])
    memory = _Memory(config, world_size, device)
    found: list[Found] = []
    listed: set[tuple[int, ...]] = set()
    looked = slower_forms = 0
    with activity("asking for the memory of", len(timed), "layouts") as progress:
        for _, _, layout, time in timed:
            looked += 1
            progress.advance()
            if layout.degrees in listed:
                slower_forms += 1
                continue
            if memory.refuses(layout, rejections):
                continue
            run = replace(layout.run(config, world_size), dry_run=True, dry_run_rank=0)
            try:
                check_run_config(run, world_size)
            except ConfigurationError as error:
                rejections.refused(error)
                continue
            found.append(Found(layout, plan_run(run, world_size), time))
            listed.add(layout.degrees)
            if len(found) == top:
                break
    slower = len(timed) - looked + slower_forms
    smallest = None if found else memory.smallest
    return Search(config, world_size, device, found, len(timed), slower, rejections, smallest)


class _Memory:
    """Whether layouts fit, asked as seldom as can be."""

    def __init__(self, config: RunConfig, world_size: int, device: DeviceMemory) -> None:
        self._config, self._world_size, self._device = config, world_size, device
        self._too_large: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        self._probed: set[tuple[object, ...]] = set()
        self.smallest: Smallest | None = None

    def refuses(self, layout: Layout, rejections: Rejections) -> bool:
        """Whether it does not fit, with the reason."""
        known = self._too_large.setdefault(layout.split, [])
        level, size = _LEVELS.index(layout.recompute), layout.micro_batch_size
        if any(level <= other and size >= larger for other, larger in known):
            rejections.add(_MEMORY, "")
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
            _MEMORY,
            f"{layout.describe(self._world_size)} with parallel.recompute={layout.recompute.name} and "
            f"micro-batches of {layout.micro_batch_size} takes {needed / GIB:.1f} GiB of "
            f"{self._device.bytes / GIB:.1f} a GPU, which is {_WORDS[fit]}",
        )
        return True

    def _needed(self, layout: Layout) -> float:
        """Bytes on the fullest rank."""
        run = layout.run(self._config, self._world_size)
        sequences = run.stage.global_batch_size // layout.replicas(self._world_size)
        return max(
            estimate_memory(run, stage, self._world_size, sequences // layout.micro_batch_size).total
            for stage in range(layout.pipeline)
        )


_MEMORY = "memory"
_WORDS = {Fit.tight: "more than the nine tenths that may be planned", Fit.too_large: "too much"}
