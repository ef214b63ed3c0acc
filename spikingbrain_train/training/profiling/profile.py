"""Some steps of a run under torch's profiler, on all ranks; the main process writes what they went to."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.parallel.agreed_precision import agree_on_precision
from spikingbrain_train.parallel.agreement import on_main_process
from spikingbrain_train.parallel.process_groups import ProcessGroups, destroy, initialize
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
from spikingbrain_train.storage.durable_files import replaced_durably
from spikingbrain_train.training.callbacks.callbacks import Callbacks
from spikingbrain_train.training.callbacks.linear_transforms import LinearTransformSchedules
from spikingbrain_train.training.callbacks.named import check_named_classes
from spikingbrain_train.training.callbacks.router_schedule import RouterSchedule
from spikingbrain_train.training.callbacks.sub_norm_schedule import SubNormSchedule
from spikingbrain_train.training.console import Console
from spikingbrain_train.training.profiling.parts import loaded, ranges_of
from spikingbrain_train.training.profiling.report import Profile, write_profile
from spikingbrain_train.training.profiling.summary import STEP, StepSummary, summarize
from spikingbrain_train.training.throughput import measure_peak_tflops
from spikingbrain_train.training.trainer import Trainer

_OF_A_RUN = frozenset({"length", "tokens", "output", "watch", "held out"})
"""First lines of a run that are not so here."""


@dataclass(frozen=True)
class Request:
    """What is to be profiled."""

    config: RunConfig
    output: Path
    """Folder of the results."""
    warm_up: int
    """Steps before, which load libraries and fill caches."""
    steps: int
    ranks: tuple[int, ...] | None = None
    """Those that are profiled; None is all."""


class QuietConsole(Console):
    """Says what is profiled, and nothing of a run that goes on from here."""

    def rows(self, rows: Sequence[tuple[str, str]], *, wrapped: bool = True) -> None:
        """See :meth:`Console.rows`."""
        super().rows([row for row in rows if row[0] not in _OF_A_RUN], wrapped=wrapped)


def profile_step(request: Request) -> None:
    """Take the steps on all ranks of this launch, print the table and write the files.

    Raises:
        SpikingBrainError: something that the user can fix.
    """
    config = request.config
    check_named_classes(config)
    accelerator = detect(config.cluster.accelerator)
    timeout = config.cluster.timeout_minutes
    groups = initialize(config.parallel, accelerator, seed=config.seed, timeout_minutes=timeout)
    try:
        precision = agree_on_precision(config, groups).precision
        accelerator.require_dtype(PARAMS_DTYPE[precision])
        found = profile_step_on(groups, replace(request, config=replace(config, precision=precision)))
        if found is not None:
            print(write_profile(found, request.output), flush=True)
    finally:
        destroy()


def profile_step_on(groups: ProcessGroups, request: Request) -> Profile | None:
    """:func:`profile_step` with groups that are formed, of a run whose precision is settled.

    The trainer is that of a run, with its data, layout and engine, but nothing is resumed, saved, evaluated
    or reported. Of the callbacks only those work that change what a step computes: the schedules of
    transforms and routers, at the stage's first steps.

    Returns:
        What the steps went to; None but on the main process. It has written the trace.
    """
    config, ranks = request.config, request.ranks or range(groups.world_size)
    on_main_process(lambda: request.output.mkdir(parents=True, exist_ok=True), groups)
    with _folder_of_a_run(request.output, groups) as folder:
        summary = _profiled(replace(config, output_dir=folder), request, groups, ranks)
    peak = None
    if groups.is_main_process:
        peak = measure_peak_tflops(groups.device, PARAMS_DTYPE[config.precision])
    everyone: list[StepSummary | None] = [None] * groups.world_size
    torch.distributed.all_gather_object(everyone, summary)
    if not groups.is_main_process:
        return None
    found = {rank: each for rank, each in enumerate(everyone) if each is not None}
    device = groups.accelerator.device_name
    return Profile.of(found, request.steps, peak, device, config.precision.value)


@contextmanager
def _folder_of_a_run(output: Path, groups: ProcessGroups) -> Iterator[str]:
    """What a run would keep in its folder lies in this one, which is gone behind the body."""
    names = [tempfile.mkdtemp(prefix=".run-", dir=output) if groups.is_main_process else ""]
    torch.distributed.broadcast_object_list(names, src=0)
    try:
        yield names[0]
    finally:
        if groups.is_main_process:
            shutil.rmtree(names[0], ignore_errors=True)


def _profiled(
    config: RunConfig, request: Request, groups: ProcessGroups, ranks: Sequence[int]
) -> StepSummary | None:
    trainer = Trainer(config, groups, console_type=QuietConsole)
    schedules = Callbacks([LinearTransformSchedules(), RouterSchedule(), SubNormSchedule()], trainer)
    schedules.start()
    on_gpu, here = groups.accelerator.is_gpu, groups.rank in ranks
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler: AbstractContextManager[Any] = nullcontext()
    if here:
        profiler = profile(activities=activities, record_shapes=True, with_flops=True)
    alone = None
    batches = loaded(trainer.data.train_batches(trainer.state.consumed_samples))
    with trainer.activity("steps before the profile", request.warm_up, "steps") as progress:
        for number in range(request.warm_up):
            began = time.perf_counter()
            _step(trainer, schedules, batches)
            progress.advance()
            if number > 0:  # the first one loads libraries
                alone = time.perf_counter() - began
    torch.distributed.barrier()  # a rank that is late would make the others wait within their first step
    with ranges_of(trainer), trainer.activity("the profiled steps"), profiler:
        for _ in range(request.steps):
            with record_function(STEP):
                _step(trainer, schedules, batches)
    if not here:
        return None
    with trainer.activity("adding up the profile"):
        if groups.rank == min(ranks):
            _write_trace(profiler, request.output / "trace.json.gz")
        summary = summarize(profiler.events() or (), on_gpu=on_gpu)  # type: ignore[attr-defined]
    return replace(summary, unprofiled=alone)


def _step(trainer: Trainer, schedules: Callbacks, batches: Iterator[MicroBatch]) -> None:
    """What the trainer does in a step, with the callbacks that change what is computed."""
    schedules.step_begin()
    samples = trainer.next_batch_size
    trainer.compute_gradients(batches)
    trainer.state.scheduler.step(increment=1)
    trainer.engine.update_weights(lambda norm: None)
    trainer.state.iteration += 1
    trainer.state.consumed_samples += samples
    schedules.step_end()
    trainer.groups.accelerator.synchronize()


def _write_trace(profiler: Any, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=path.parent) as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with (
            replaced_durably(path) as temporary,
            plain.open("rb") as source,
            gzip.open(temporary, "wb") as to,
        ):
            shutil.copyfileobj(source, to)
