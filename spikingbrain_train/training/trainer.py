"""The training loop: build, load or resume, then step after step until the stage is done.

Whatever else happens around a step (reports, evaluations, checkpoints, signals) hangs on its hooks: see
:mod:`~spikingbrain_train.training.callbacks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch

from spikingbrain_train.checkpoint.run_checkpoints import RunCheckpoints
from spikingbrain_train.config.command_line import START_AGAIN
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import SamplesRead, record_of
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.models.weight_gradients import describe as describe_weight_gradients
from spikingbrain_train.parallel.agreed_precision import agree_on_precision
from spikingbrain_train.parallel.agreement import locked_output_dir
from spikingbrain_train.parallel.heartbeats import Heartbeats
from spikingbrain_train.parallel.process_groups import ProcessGroups, destroy, initialize
from spikingbrain_train.planning.data_plan import plan_data
from spikingbrain_train.planning.data_position import position_of
from spikingbrain_train.planning.memory_warning import memory_warning
from spikingbrain_train.planning.token_history import history_of
from spikingbrain_train.planning.unread_settings import unread_settings
from spikingbrain_train.reporting.activity import Activity, activity
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.reporting.start_times import StartTimes, process_began
from spikingbrain_train.runtime import patches
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE, slow_format_warning
from spikingbrain_train.runtime.deterministic import deterministic_algorithms
from spikingbrain_train.runtime.kernel_order import kernel_order_warning
from spikingbrain_train.training.beginning import facts_of, resumed, started
from spikingbrain_train.training.build import (
    build_student,
    describe_parameters,
    kernels_of,
)
from spikingbrain_train.training.callbacks.callback import Callback, SkipUpdate
from spikingbrain_train.training.callbacks.callbacks import Callbacks
from spikingbrain_train.training.callbacks.defaults import callbacks_of
from spikingbrain_train.training.callbacks.named import check_named_classes
from spikingbrain_train.training.console import Console
from spikingbrain_train.training.data_waits import DataWaits
from spikingbrain_train.training.engines.build import build_engine
from spikingbrain_train.training.kernels import choose_kernels
from spikingbrain_train.training.opening import opening
from spikingbrain_train.training.optimizer import (
    build_scheduler,
    reported_learning_rate,
    scale_learning_rates,
)
from spikingbrain_train.training.report import Report
from spikingbrain_train.training.run_details import heading
from spikingbrain_train.training.stages.build import stage_class
from spikingbrain_train.training.stages.losses import StepLosses
from spikingbrain_train.training.training_state import TrainingState


def run(config: RunConfig) -> None:
    """Train one stage on all ranks of this launch.

    Raises:
        SpikingBrainError: something the user can fix; every rank raises it or is stopped by the launcher.
        SystemExit: with code START_AGAIN on every rank, when the run was asked to stop and has saved.
    """
    check_named_classes(config)
    with deterministic_algorithms(config.numerics.deterministic):
        _run(config)


def _run(config: RunConfig) -> None:
    accelerator = detect(config.cluster.accelerator)
    timeout = config.cluster.timeout_minutes
    times = StartTimes(process_began())
    times.add("imports and checks", times.until_now())
    waiting = "waiting for all ranks"
    with times.part(waiting), activity(waiting, shown=os.environ.get("RANK", "0") == "0"):
        groups = initialize(config.parallel, accelerator, seed=config.seed, timeout_minutes=timeout)
    try:
        with Heartbeats(groups, timeout) as heartbeats:
            choice = agree_on_precision(config, groups)
            settled, dtype = replace(config, precision=choice.precision), PARAMS_DTYPE[choice.precision]
            accelerator.require_dtype(dtype)
            if groups.is_main_process:
                slow = slow_format_warning(f"precision={choice.precision.value}", dtype, accelerator)
                large = memory_warning(settled, groups.world_size, accelerator.memory_bytes())
                order = kernel_order_warning(settled.parallel, accelerator)
                data = [f"warning: {warning}" for warning in plan_data(settled).warnings()]
                for warning in filter(None, (slow, large, order, *data)):
                    print(warning, flush=True)
            with locked_output_dir(config.output_dir, groups):
                trainer = Trainer(settled, groups, details=[heading(), choice.describe()], start_times=times)
                heartbeats.follow(lambda: trainer.state.iteration)
                finished = trainer.train()
            if not finished and groups.world_size > 1:
                # torchrun ends the others when the first is gone; rank 0 may still close its metrics.
                torch.distributed.barrier()
    finally:
        destroy()
    if not finished:
        raise SystemExit(START_AGAIN)


class Trainer:
    """One stage of one run. It is the :class:`~.callbacks.callback.Run` that callbacks see.

    Args:
        config: the run; its precision is settled (see :func:`run`).
        groups: process groups, already formed.
        more_callbacks: beside our own and those that the config names.
        details: what run_details.txt begins with.
        start_times: of this process so far; None where its start is that of the trainer.
        console_type: what says things to the user; tools that are no run say less.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        more_callbacks: Sequence[Callback] = (),
        *,
        details: Sequence[str] = (),
        start_times: StartTimes | None = None,
        console_type: type[Console] = Console,
    ) -> None:
        self.config = config
        self.groups = groups
        self.stop_reason: str | None = None
        self.data_waits = DataWaits()
        self.console = console_type(
            config.stage.train_iters,
            config.output_dir,
            is_main_process=groups.is_main_process,
            start_times=start_times,
        )
        self.checkpoints = RunCheckpoints(config, groups, self.say)
        self.callbacks = Callbacks(callbacks_of(config, more_callbacks), self)
        resuming = self.checkpoints.are_resumed()
        kind = stage_class(config.stage)
        with self.activity("opening the data"):
            self.record = record_of(config, groups.world_size, history_of(config))
            at_opening = position_of(config)
            self.data = kind.open_data(config, groups, self.activity)
            facts = facts_of(config, groups.world_size, self.data.held_out)

        self.console.rows(opening(config, groups, self.record, self.data.held_out, resuming=resuming))
        accelerator = groups.accelerator
        kernels = kernels_of(config, accelerator)
        chosen = choose_kernels(config, kernels, accelerator)
        self.console.rows(chosen.rows(on_gpu=accelerator.is_gpu))
        with self.activity("building and loading the model"):
            self.stage = kind.build(config, kernels, groups)
            student = build_student(config, kernels, groups, resuming=resuming)
        self.stage.freeze(student)
        details = [*details, accelerator.describe(), groups.describe(), patches.describe(accelerator)]
        details += [chosen.describe(), describe_parameters(student)]
        self.engine = build_engine(config, student, groups)
        details += describe_weight_gradients(student)
        self.model = self.engine.model
        scheduler = build_scheduler(config.optimizer, config.stage.train_iters, self.engine.optimizer)
        self.state = TrainingState(self.engine, scheduler, self.callbacks)
        if resuming:
            with self.activity("loading the checkpoint"):
                stored = self.checkpoints.resume(self.state)
            read = SamplesRead(self.state.iteration, self.state.consumed_samples)
            if read != at_opening and not self.checkpoints.is_from_memory:
                # An older checkpoint has taken the place of a damaged one.
                self.data = kind.open_data(config, groups, self.activity)
            self.record = replace(self.record, counted_from=read)
            self.beginning = resumed(stored, config, self.state.consumed_samples, facts)
        else:
            self.beginning = started(config, facts)
        # Here: a run that is refused leaves no file.
        for line in details:
            self.console.detail(line)
        self.console.rows(self.beginning.rows)
        self.console.rows([("note", each.describe()) for each in unread_settings(config)])

    def train(self) -> bool:
        """Run from the current iteration to the last, or until something asks to :meth:`stop`.

        Returns:
            Whether the last iteration is done. Either way the newest checkpoint is that of the current one.
        """
        with self._callbacks_running():
            if self.beginning.is_start:
                self._prepare()
                if self.is_last_step:  # a stage without steps
                    self.engine.begin_state()
                    self.callbacks.step_end()
            batches = self.data_waits.over(self.data.train_batches(self.state.consumed_samples))
            while not self.is_last_step and self.stop_reason is None:
                self._step(batches)
            if not self.is_last_step:
                at = self.state.iteration
                self.say(f"{self.stop_reason}: stopped at iteration {at}; start again to go on")
        return self.is_last_step

    def _step(self, batches: Iterator[MicroBatch]) -> None:
        """One iteration. Nothing in it waits for the device behind the update."""
        state, grad_norm = self.state, None
        self.callbacks.step_begin()
        samples = self.next_batch_size
        losses = self.compute_gradients(batches)
        state.scheduler.step(increment=1)
        scale_learning_rates(state.optimizer, self.config.stage.batch_sizes.lr_factor(state.consumed_samples))
        try:
            grad_norm = self.engine.update_weights(partial(self.callbacks.agree, losses))
        except SkipUpdate as skipped:
            self.callbacks.update_skipped(skipped)
        state.iteration += 1
        state.consumed_samples += samples
        is_due = self.is_last_step or state.iteration % self.config.logging.log_interval == 0
        if is_due and grad_norm is not None:
            self._report_step(losses, grad_norm, samples)
        self.callbacks.step_end()

    def compute_gradients(self, batches: Iterator[MicroBatch]) -> StepLosses:
        """Forward and backward pass over the micro-batches of one step; the gradients begin at zero."""
        self.engine.begin_gradients()
        return self.stage.forward_backward(self.model, batches, self._micro_batches_of(self.next_batch_size))

    def _report_step(self, losses: StepLosses, grad_norm: float, batch_size: int) -> None:
        report = Report(self.state.iteration, losses.reduced(), shown=dict(self.stage.shown))
        rate = reported_learning_rate(self.state.optimizer)
        report.add("train/learning_rate", rate, Shown("lr", "{:.2e}"))
        report.add("train/grad_norm", grad_norm, Shown("grad norm", "{:.3f}"))
        if self.config.stage.batch_size_ramp.start is not None:
            report.add("train/global_batch_size", batch_size, Shown("batch", "{:,.0f}"))
        self.state.gather_updated_weights()
        report.add("train/parameter_norm", self.engine.parameter_norm(self.groups).item())
        self.callbacks.report_due(report)
        self.report(report)

    def _prepare(self) -> None:
        """Let the stage set what it can in closed form, and the optimizer's fp32 weights follow."""
        batches = self.data.train_batches(consumed_samples=0)
        num_microbatches = self._micro_batches_of(self.config.stage.global_batch_size)
        with self.engine.whole_weights():
            metrics = self.stage.prepare(self.state.model, batches, num_microbatches, self.console)
        self.engine.follow_weights()
        if metrics:
            self.report(Report(0, metrics))

    @contextmanager
    def _callbacks_running(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            self.callbacks.start()
            yield
        except BaseException as met:
            error = met
            raise
        finally:
            self.callbacks.end(error)

    @property
    def next_batch_size(self) -> int:
        """Sequences that the next step reads, over all ranks."""
        return self.config.stage.batch_sizes.at(self.state.consumed_samples)

    def _micro_batches_of(self, batch_size: int) -> int:
        """Micro-batches on this rank of a step of so many sequences."""
        return batch_size // (self.config.stage.micro_batch_size * self.groups.data_parallel_size)

    @property
    def is_last_step(self) -> bool:
        """Whether the stage's last step is done."""
        return self.state.iteration >= self.config.stage.train_iters

    def stop(self, reason: str) -> None:
        """End after this step: save, and be started again later. Called on all ranks together."""
        self.stop_reason = reason

    def report(self, report: Report) -> None:
        """Let every callback log a point, on the main process."""
        if self.groups.is_main_process:
            self.callbacks.log(report)

    def say(self, text: str) -> None:
        """Write a line for the user, on the main process."""
        self.console.say(text)

    def activity(
        self, what: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Activity]:
        """Let the log say that ``what`` still runs while the body does, on the main process."""
        return self.console.activity(what, total, unit)
