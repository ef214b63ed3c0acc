"""How fast a run is, how much of the hardware's peak that is, and what memory it takes."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from spikingbrain_train.config.run import Precision
from spikingbrain_train.planning.duration import TFLOPS_METRIC
from spikingbrain_train.planning.known_peaks import known_peak_tflops
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report
from spikingbrain_train.training.throughput import (
    ThroughputTimer,
    measure_peak_tflops,
    model_flops_utilization,
)


class Speed(Callback):
    """Reports tokens per second and in all, TFLOP/s of a rank, MFU and memory.

    As ``train/tokens_per_second`` (of all ranks and ``_per_rank``), ``train/step_seconds``,
    ``train/data_seconds`` (of the rank that waited longest for batches), ``train/tokens``, ``train/tflops``
    (model FLOPs, from which a later plan reckons hours), ``train/mfu`` (left out where the peak is neither
    set nor known nor measurable) and ``train/memory_gib``. Evaluations, and standing still for checkpoints,
    don't count; the latter is ``train/checkpoint_seconds``.
    """

    def __init__(self) -> None:
        self._timer: ThroughputTimer | None = None
        self._pause = ExitStack()
        self._save_began: float | None = None
        self._save_seconds = 0.0

    def start(self) -> None:
        """Find the peak: ``cluster.peak_tflops``, what is known of the GPU, or measured on this rank."""
        config, groups = self.run.config, self.run.groups
        self._flops_per_token = plan_run(config, groups.world_size).flops_per_token
        self._peak_tflops = config.cluster.peak_tflops
        if self._peak_tflops is None and config.precision is Precision.bf16:
            self._peak_tflops = known_peak_tflops(groups.accelerator.device_name)
            if (peak := self._peak_tflops) is not None:
                stated = f"against {peak:g} TFLOP/s a rank, what {groups.accelerator.device_name} is sold for"
                self.run.console.rows([("MFU", stated)])
        if self._peak_tflops is None:
            with self.run.activity("measuring the peak of a matrix product"):
                self._peak_tflops = measure_peak_tflops(groups.device, PARAMS_DTYPE[config.precision])
            against = "not reported: too busy to measure this machine's peak (cluster.peak_tflops states it)"
            if (peak := self._peak_tflops) is not None:
                digits = f"{peak:.2f}" if peak >= 0.1 else f"{peak:.2g}"
                precision = config.precision.value
                against = f"against {digits} TFLOP/s a rank, measured here as the peak in {precision}"
            self.run.console.rows([("MFU", against)])

    def step_begin(self) -> None:
        if self._timer is None:
            self._timer = ThroughputTimer()
        self._timer.step(self.run.next_batch_size * self.run.config.stage.seq_length)

    def report_due(self, report: Report) -> None:
        assert self._timer is not None
        run, speed = self.run, self._timer.interval()
        report.add("train/tokens_per_second", speed.tokens_per_second, Shown("", "{:,.0f} tokens/s"))
        per_rank = speed.tokens_per_second / run.groups.world_size
        report.add("train/tokens_per_second_per_rank", per_rank)
        report.add("train/step_seconds", speed.seconds_per_iteration)
        if self._peak_tflops is not None:
            utilization = model_flops_utilization(
                speed.tokens_per_second, self._flops_per_token, self._peak_tflops, run.groups.world_size
            )
            report.add("train/mfu", utilization, Shown("MFU", "{:.1%}"))
        memory = run.groups.accelerator.peak_memory_bytes() / 2**30
        report.add("train/memory_gib", memory, Shown("", "{:.1f} GiB"))
        report.add("train/data_seconds", self._longest_data_wait())
        report.add("train/checkpoint_seconds", self._save_seconds)
        self._save_seconds = 0.0
        tflops = speed.tokens_per_second * self._flops_per_token / run.groups.world_size / 1e12
        report.add(TFLOPS_METRIC, tflops)
        report.add("train/tokens", float(run.state.consumed_samples * run.config.stage.seq_length))
        report.seconds_per_iteration = speed.seconds_per_iteration

    def _longest_data_wait(self) -> float:
        groups = self.run.groups
        waited = torch.full((), self.run.data_waits.take(), dtype=torch.float64, device=groups.device)
        torch.distributed.all_reduce(waited, op=torch.distributed.ReduceOp.MAX)
        return waited.item()

    def before_evaluation(self) -> None:
        self._begin_pause()

    def after_evaluation(self, report: Report) -> None:
        self._pause.close()

    def before_save(self) -> None:
        self._begin_pause()
        self._save_began = time.monotonic()

    def after_snapshot(self) -> None:
        self._pause.close()
        assert self._save_began is not None
        self._save_seconds += time.monotonic() - self._save_began

    def _begin_pause(self) -> None:
        if self._timer is not None:
            self._pause.enter_context(self._timer.pause())
