"""The training loop: build, load or resume, then step, report, evaluate and save until the stage is done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from spikingbrain_train.checkpoint.run_checkpoints import RunCheckpoints
from spikingbrain_train.config.command_line import START_AGAIN
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import record_of
from spikingbrain_train.data.gpt_dataset import build_datasets
from spikingbrain_train.data.loader import MicroBatch, WholeBatch, build_data_loader, local_micro_batch
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.evaluation.held_out import held_out_cross_entropy
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.models.spiking_linear import collect_spike_statistics, set_spike_k
from spikingbrain_train.parallel.agreed_precision import agree_on_precision
from spikingbrain_train.parallel.agreement import locked_output_dir
from spikingbrain_train.parallel.heartbeats import Heartbeats
from spikingbrain_train.parallel.process_groups import ProcessGroups, destroy, initialize
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.reporting.activity import Activity, activity
from spikingbrain_train.reporting.progress import ProgressPrinter
from spikingbrain_train.runtime import patches
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE, slow_format_warning
from spikingbrain_train.training.beginning import resumed, started
from spikingbrain_train.training.build import (
    build_student,
    parameter_counts,
    wrap_data_parallel,
)
from spikingbrain_train.training.data_check import check_tokens_together
from spikingbrain_train.training.expert_load import ExpertLoadCounter
from spikingbrain_train.training.finite_checks import require_finite
from spikingbrain_train.training.heat_map import HeatMap
from spikingbrain_train.training.kernels import choose_kernels
from spikingbrain_train.training.metrics import MetricsLogger
from spikingbrain_train.training.optimizer import build_optimizer, build_scheduler, update_weights
from spikingbrain_train.training.signals import StopSignals
from spikingbrain_train.training.spike_annealing import spike_k
from spikingbrain_train.training.stages.build import build_stage
from spikingbrain_train.training.throughput import (
    ThroughputTimer,
    measure_peak_tflops,
    model_flops_utilization,
)
from spikingbrain_train.training.training_state import TrainingState


def run(config: RunConfig) -> None:
    """Train one stage on all ranks of this launch.

    Raises:
        SpikingBrainError: something the user can fix; every rank raises it or is stopped by the launcher.
        SystemExit: with code START_AGAIN on every rank, when the run was asked to stop and has saved.
    """
    accelerator = detect(config.cluster.accelerator)
    timeout = config.cluster.timeout_minutes
    with activity("waiting for all ranks", shown=os.environ.get("RANK", "0") == "0"):
        groups = initialize(config.parallel, accelerator, seed=config.seed, timeout_minutes=timeout)
    try:
        with Heartbeats(groups, timeout) as heartbeats:
            choice = agree_on_precision(config, groups)
            dtype = PARAMS_DTYPE[choice.precision]
            accelerator.require_dtype(dtype)
            if groups.is_main_process:
                slow = slow_format_warning(f"precision={choice.precision.value}", dtype, accelerator)
                print(*(line for line in (choice.describe(), slow) if line), sep="\n", flush=True)
            with locked_output_dir(config.output_dir, groups):
                trainer = Trainer(replace(config, precision=choice.precision), groups)
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
    """One stage of one run.

    Args:
        config: the run; its precision is settled (see :func:`run`).
        groups: process groups, already formed.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups) -> None:
        self.config = config
        self.groups = groups
        self.progress = ProgressPrinter(config.stage.train_iters)
        self.checkpoints = RunCheckpoints(config, groups, self._say)
        self.stop_signals = StopSignals(groups)
        resuming = self.checkpoints.are_resumed()
        with self._activity("opening the data"):
            self._open_data()

        accelerator = groups.accelerator
        kernels = resolve_kernels(
            config.cluster.kernels, accelerator, spiking=config.model.spiking, precision=config.precision
        )
        chosen = choose_kernels(config, kernels, accelerator).describe()
        for line in (accelerator.describe(), groups.describe(), patches.describe(accelerator), chosen):
            self._say(line)
        self.num_microbatches = config.stage.global_batch_size // (
            config.stage.micro_batch_size * groups.data_parallel_size
        )
        with self._activity("building and loading the model"):
            self.step = build_stage(config, kernels, groups)
            student = build_student(config, kernels, groups, resuming=resuming)
        self.step.freeze(student)
        total, trainable = parameter_counts(student)
        self._say(f"rank 0 holds {total:,} parameters, {trainable:,} of them trainable")
        self.model = wrap_data_parallel(student, config.parallel)
        optimizer = build_optimizer(config.optimizer, config.parallel, config.precision, self.model)
        scheduler = build_scheduler(config.optimizer, config.stage.train_iters, optimizer)
        self.state = TrainingState(self.model, optimizer, scheduler)
        self.expert_load = ExpertLoadCounter(student, groups)
        if resuming:
            with self._activity("loading the checkpoint"):
                stored = self.checkpoints.resume(self.state)
            for line in resumed(stored, config, self.state.consumed_samples, groups.world_size):
                self._say(line)
        else:
            self._say(started(config))
        self.metrics = MetricsLogger(
            config.logging,
            config.output_dir,
            is_logging_rank=groups.is_main_process,
            resumed_iteration=self.state.iteration,
            run_config=cast(
                dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
            ),
        )

    def train(self) -> bool:
        """Run from the current iteration to the last, or until a signal asks to stop (see StopSignals).

        Returns:
            Whether the last iteration is done. Either way the newest checkpoint is that of the current one.
        """
        config, state = self.config, self.state
        with ExitStack() as stack:
            stack.enter_context(self.metrics)
            stack.enter_context(self.progress.watched())
            timer = ThroughputTimer()
            flops_per_token, peak_tflops = self._speed_of_light()
            if state.iteration == 0:
                with timer.pause():
                    self._evaluate()
                    self._prepare()
            tokens_per_step = config.stage.global_batch_size * config.stage.seq_length
            batches = self._train_batches(state.consumed_samples)
            stack.enter_context(self.stop_signals)
            while state.iteration < config.stage.train_iters:
                metrics, asked = self._train_step(batches)
                timer.step(tokens_per_step)
                last = state.iteration == config.stage.train_iters
                self._tell_step()
                if last or state.iteration % config.logging.log_interval == 0:
                    speed = timer.interval()
                    metrics |= {
                        "train/tokens_per_second": speed.tokens_per_second,
                        "train/tokens": float(state.consumed_samples * config.stage.seq_length),
                        "train/memory_gib": self.groups.accelerator.peak_memory_bytes() / 2**30,
                    }
                    if peak_tflops is not None:
                        metrics["train/mfu"] = model_flops_utilization(
                            speed.tokens_per_second, flops_per_token, peak_tflops, self.groups.world_size
                        )
                    heat_maps: dict[str, HeatMap] = {}
                    if load := self.expert_load.collect():
                        metrics |= load.metrics()
                        heat_maps["moe/expert_load"] = load.heat_map()
                    self._report(metrics, speed.seconds_per_iteration, heat_maps)
                with timer.pause():
                    # Who asks to stop does not wait long: the checkpoint comes first, and nothing after it.
                    if last or (not asked and _is_due(state.iteration, config.logging.eval_interval)):
                        self._evaluate()
                    if last or asked or _is_due(state.iteration, config.checkpoint.save_interval):
                        self._save()
                if asked and not last:
                    self._say(f"{asked.name}: stopped at iteration {state.iteration}; start again to go on")
                    return False
        return True

    def _train_step(self, batches: Iterator[MicroBatch]) -> tuple[dict[str, float], signal.Signals | None]:
        """One iteration. Returns its metrics, and the signal that asks to stop after it."""
        config, state = self.config, self.state
        spiking = self._set_spike_k()
        self.expert_load.reset()
        self.model.zero_grad_buffer()
        state.optimizer.zero_grad()
        metrics = self.step.forward_backward(self.model, batches, self.num_microbatches)
        self._require_finite(metrics["train/loss"], "loss", state.iteration + 1)
        asked = self.stop_signals.requested()  # not after the update, for which the host need not wait
        state.scheduler.step(increment=1)
        metrics["train/grad_norm"] = update_weights(
            state.optimizer, lambda norm: self._require_finite(norm, "gradient norm", state.iteration + 1)
        )
        state.iteration += 1
        state.consumed_samples += config.stage.global_batch_size
        metrics["train/learning_rate"] = self._learning_rate()
        return metrics | spiking, asked

    def _require_finite(self, value: float, what: str, iteration: int) -> None:
        require_finite(value, what, iteration, self.state.iteration, self.config)

    def _set_spike_k(self) -> dict[str, float]:
        """Give the model the k of the current iteration; returns it as a metric."""
        if not self.config.model.spiking.projections:
            return {}
        k = spike_k(self.config.stage.spike_annealing, self.config.model.spiking, self.state.iteration)
        set_spike_k(self.state.model, k)
        return {"spiking/k": k}

    def _learning_rate(self) -> float:
        """The rate of parameters that the source already had, or of the new ones where only those train."""
        groups = self.state.optimizer.param_groups
        rates = [group["lr"] for group in groups if group["default_config"]] or [g["lr"] for g in groups]
        return rates[0] if rates else 0.0

    def _evaluate(self) -> None:
        if self.valid_dataset is None:
            return
        stage = self.config.stage
        metrics = self._set_spike_k()
        loader = build_data_loader(
            self.valid_dataset,
            consumed_samples=0,
            micro_batch_size=stage.micro_batch_size,
            data_parallel_rank=self.groups.data_parallel_rank,
            data_parallel_size=self.groups.data_parallel_size,
        )
        per_step = stage.micro_batch_size * self.groups.data_parallel_size
        batches = -(-len(self.valid_dataset) // per_step)
        with (
            collect_spike_statistics(self.state.model, self.groups.device) as spikes,
            self._activity("evaluating", batches, "batches") as progress,
        ):
            cross_entropy = held_out_cross_entropy(
                self.state.model,
                progress.over(self._local(loader, self.config.model.num_sink_tokens)),
                batches,
                seq_length=stage.seq_length,
                micro_batch_size=stage.micro_batch_size,
                groups=self.groups,
            )
        self._require_finite(cross_entropy, "held-out cross entropy", self.state.iteration)
        if metrics:
            torch.distributed.all_reduce(spikes.histogram)
            metrics |= {
                "spiking/sparsity": spikes.sparsity(),
                "spiking/share_up_to_7": spikes.share_up_to(7),
            }
        self._report(metrics | {"valid/cross_entropy": cross_entropy})

    def _save(self) -> None:
        with self._activity("saving"):
            folder = self.checkpoints.save(self.state, self.record)
        self._say(f"saved {folder}")

    def _open_data(self) -> None:
        config = self.config
        stage = config.stage
        self.record = record_of(config, self.groups.world_size)
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        prefixes = [*config.data.train, *config.data.valid]
        output_dir = Path(config.output_dir)
        check_tokens_together(prefixes, config.model.vocab_size, self.groups, output_dir, self._activity)
        self.train_dataset, self.valid_dataset = build_datasets(
            config.data,
            stage.seq_length,
            train_samples=stage.train_iters * stage.global_batch_size,
            valid_samples=config.logging.eval_iters * stage.global_batch_size,
            seed=config.seed,
            vocab_size=config.model.vocab_size,
            tokenizer=tokenizer,
        )

    def _prepare(self) -> None:
        """Let the stage set what it can in closed form, and the optimizer's fp32 weights follow."""
        self._set_spike_k()
        with self._activity(f"preparing the {self.config.stage.kind} stage", unit="batches") as progress:
            batches = progress.over(self._train_batches(consumed_samples=0))
            self.step.prepare(self.state.model, batches, self.num_microbatches)
            self.state.optimizer.reload_model_params()

    def _train_batches(self, consumed_samples: int) -> Iterator[MicroBatch]:
        stage = self.config.stage
        loader = build_data_loader(
            self.train_dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=stage.micro_batch_size,
            data_parallel_rank=self.groups.data_parallel_rank,
            data_parallel_size=self.groups.data_parallel_size,
            global_batch_size=stage.global_batch_size,
            num_workers=self.config.data.num_workers,
            pin_memory=self.groups.accelerator.is_gpu,
            seed=self.config.seed,
        )
        sinks = self.config.model.num_sink_tokens if kind_of(stage).sees_sinks else 0
        return self._local(loader, sinks)

    def _local(self, loader: Iterator[WholeBatch], num_sink_tokens: int) -> Iterator[MicroBatch]:
        """This rank's part of every micro-batch, on its device."""
        for whole in loader:
            yield local_micro_batch(
                whole,
                self.groups.device,
                num_sink_tokens=num_sink_tokens,
                context_parallel_rank=self.groups.context_parallel_rank,
                context_parallel_size=self.groups.context_parallel_size,
            )

    def _speed_of_light(self) -> tuple[float, float | None]:
        """FLOPs of one token, and the peak TFLOP/s of one rank that they are held against, if it is known."""
        flops = plan_run(self.config, self.groups.world_size).flops_per_token
        peak = self.config.cluster.peak_tflops
        if peak is None:
            with self._activity("measuring the peak of a matrix product"):
                peak = measure_peak_tflops(self.groups.device, PARAMS_DTYPE[self.config.precision])
            measured = "not known, and neither is MFU: this machine is too busy to measure it"
            if peak is not None:
                digits = f"{peak:.2f}" if peak >= 0.1 else f"{peak:.2g}"
                measured = f"{digits} TFLOP/s in {self.config.precision.value} (measured)"
            self._say(f"peak of one rank: {measured}")
        return flops, peak

    def _report(
        self,
        metrics: dict[str, float],
        seconds_per_iteration: float | None = None,
        heat_maps: dict[str, HeatMap] | None = None,
    ) -> None:
        if self.groups.is_main_process:
            self.metrics.log(self.state.iteration, metrics, heat_maps)
            self.progress.report(self.state.iteration, metrics, seconds_per_iteration=seconds_per_iteration)

    def _tell_step(self) -> None:
        if self.groups.is_main_process:
            self.progress.step(self.state.iteration)

    def _activity(
        self, what: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Activity]:
        """Let the log say that this still runs; on rank 0."""
        if self.groups.is_main_process:
            return self.progress.status.activity(what, total, unit)
        return nullcontext(Activity(None, what, total, unit))

    def _say(self, text: str) -> None:
        if self.groups.is_main_process:
            self.progress.message(text)


def _is_due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
