"""What benchmarks/training_step.py compares: one optimizer step of our trainer and of transformers, each in a
process of its own.

A process of its own keeps megatron-core's CPU patches away from transformers, and makes the peak memory of
each contender its own. The processes take turns; whoever does not run sleeps on its pipe.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.project_commands import OutOfTimeError
from spikingbrain_train.architecture.layers import dense_source
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import CheckpointConfig, Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.runtime.accelerator import detect

SEED = 1234


@dataclass(frozen=True)
class Setting:
    """What one contender is to do."""

    model: ModelConfig
    """The hybrid; the peers train its dense source."""
    hf_folder: Path | None
    """Dense Hugging Face checkpoint with real weights for the peers; None for random ones."""
    megatron_folder: Path | None
    """The same checkpoint converted to the hybrid; None for random weights."""
    weights: Path | None
    """A file of our weights: written by the first process that is given it, read by the next."""
    seq_length: int
    threads: int
    device: str
    precision: Precision
    """Of our trainer, and of the product whose peak MFU is a share of."""
    recompute: Recompute = Recompute.none
    """Of our trainer."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """Of our trainer."""

    @property
    def run_config(self) -> RunConfig:
        """The run whose steps ours takes, and whose memory a plan estimates."""
        return RunConfig(
            model=self.model,
            stage=StageConfig(
                train_iters=1, seq_length=self.seq_length, micro_batch_size=1, global_batch_size=1
            ),
            parallel=ParallelConfig(recompute=self.recompute),
            checkpoint=CheckpointConfig(
                load=None if self.megatron_folder is None else str(self.megatron_folder)
            ),
            precision=self.precision,
            fp8=self.fp8,
            output_dir="unused",
        )


@dataclass(frozen=True)
class Measured:
    """One optimizer step."""

    seconds: float
    """Wall time."""
    cpu_seconds: float
    """CPU time of the contender's process, over its threads."""
    loss: float
    """Mean next-token cross entropy before the update, nats."""
    peak_bytes: int
    """Most memory held so far: resident on CPU, allocated on a GPU."""


class Contender(Protocol):
    """One way to take an optimizer step."""

    def __init__(self, setting: Setting) -> None: ...

    def step(self, tokens: torch.Tensor) -> float:
        """Forward, backward, clip, AdamW on [1, T + 1] token ids; returns the loss, so it waits for a GPU."""


class Ours:
    """What spikingbrain_train.training.trainer.Trainer does in a step, without data and reports."""

    def __init__(self, setting: Setting) -> None:
        from spikingbrain_train.models.kernels import resolve_kernels
        from spikingbrain_train.parallel.process_groups import initialize
        from spikingbrain_train.training.build import build_student, wrap_data_parallel
        from spikingbrain_train.training.optimizer import build_optimizer
        from spikingbrain_train.training.stages.pretraining import ContinualPretraining

        accelerator = detect(setting.device)
        self.config = setting.run_config
        groups = initialize(self.config.parallel, accelerator, seed=SEED)
        torch.set_num_threads(setting.threads)
        kernels = resolve_kernels(
            self.config.cluster.kernels,
            accelerator,
            model=setting.model,
            precision=setting.precision,
            in_fp8=setting.fp8.format is not None,
        )
        student = build_student(self.config, kernels, groups)
        if setting.weights is not None:
            _share_weights(student, setting.weights)
        self.stage_step = ContinualPretraining(self.config.stage, groups)
        self.model = wrap_data_parallel(student, self.config.parallel)
        self.optimizer = build_optimizer(
            self.config.optimizer, self.config.parallel, self.config.precision, self.model
        )

    def step(self, tokens: torch.Tensor) -> float:
        batch = MicroBatch(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:],
            loss_mask=torch.ones_like(tokens[:, 1:], dtype=torch.float32),
            layout=SequenceLayout(tokens.shape[1] - 1),
        )
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.stage_step.forward_backward(self.model, iter([batch]), 1)
        self.optimizer.step()
        return losses.reduced()["train/loss"]


def _share_weights(model: torch.nn.Module, file: Path) -> None:
    """Start every device from the same random weights."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        torch.save({name: p.detach() for name, p in model.state_dict().items() if p is not None}, file)


def _transformers_model(setting: Setting, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from spikingbrain_train.conversion.formats.registry import format_of_model

    if setting.hf_folder is not None:
        config = AutoConfig.from_pretrained(setting.hf_folder)
        config.num_hidden_layers = setting.model.num_layers
        model = AutoModelForCausalLM.from_pretrained(
            setting.hf_folder, config=config, dtype=dtype, attn_implementation="sdpa"
        )
    else:
        torch.manual_seed(SEED)
        source = dense_source(setting.model)
        keys = format_of_model(source).config(source, None, str(dtype).split(".")[1])
        config = AutoConfig.for_model(**keys)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(setting.device).train()


def _adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class TransformersFP32:
    """transformers with float32 weights and products, torch's clipping and fused AdamW."""

    autocasts = False

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        self.device = setting.device
        self.model = _transformers_model(setting, torch.float32)
        self.parameters = list(self.model.parameters())
        self.optimizer = _adamw(self.parameters)

    def step(self, tokens: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocasts):
            loss = self.model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()


class TransformersAutocast(TransformersFP32):
    """The same, its products in bf16."""

    autocasts = True


class TransformersBF16:
    """transformers with bf16 weights and float32 main weights, which is how our trainer keeps them."""

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        self.model = _transformers_model(setting, torch.bfloat16)
        self.parameters = list(self.model.parameters())
        self.main = [p.detach().float().requires_grad_() for p in self.parameters]
        for main in self.main:
            main.grad = torch.empty_like(main)
        self.optimizer = _adamw(self.main)

    def step(self, tokens: torch.Tensor) -> float:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_([main.grad for main in self.main], [p.grad for p in self.parameters])
            torch.nn.utils.clip_grad_norm_(self.main, 1.0)
            self.optimizer.step()
            torch._foreach_copy_(self.parameters, self.main)
        return loss.item()


OURS = "hybrid (ours)"
PEERS = {
    "fp32": "transformers, fp32",
    "autocast": "transformers, autocast",
    "bf16": "transformers, bf16",
}
PEERS_OF = {Precision.fp32: ("fp32",), Precision.bf16: ("autocast", "bf16")}
"""The ways in which a user of transformers trains in a precision."""
CONTENDERS: dict[str, Callable[[Setting], Contender]] = {
    OURS: Ours,
    PEERS["fp32"]: TransformersFP32,
    PEERS["autocast"]: TransformersAutocast,
    PEERS["bf16"]: TransformersBF16,
}


class ContenderOutOfMemoryError(Exception):
    """A GPU has too little memory for a contender."""


class ContenderProcess:
    """A contender in its own process. Use as a context manager: leaving it ends the process.

    Args:
        name: one of :data:`CONTENDERS`.
        setting: what it trains.
        deadline: ``time.monotonic()`` at which it is ended, whatever it does; None waits.

    Raises:
        OutOfTimeError: here and of its methods, at the deadline.
        ContenderOutOfMemoryError: likewise, when the GPU's memory does not suffice.
    """

    def __init__(self, name: str, setting: Setting, deadline: float | None = None) -> None:
        self._deadline = deadline
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setting), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def step(self) -> Measured:
        """Take one optimizer step, on the next of a fixed series of random batches."""
        self._pipe.send("step")
        return self._answer()

    def peak_tflops(self, clock: str) -> float:
        """TFLOP/s of a large product in this process's threads, by ``wall`` or ``cpu`` time."""
        self._pipe.send(f"peak by {clock}")
        return self._answer()

    def _answer(self) -> Any:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if not self._pipe.poll(left):
            self._process.kill()
            self._process.join()
            raise OutOfTimeError
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(
                f"error: a contender ended with exit code {self._process.exitcode} (-9 often means that "
                "memory ran out: lower --layers or --seq-lengths)"
            ) from None
        if isinstance(answer, ContenderOutOfMemoryError):
            raise answer
        return answer


def _serve(pipe: Connection, name: str, setting: Setting) -> None:
    try:
        _take_steps(pipe, name, setting)
    except torch.OutOfMemoryError as error:
        pipe.send(ContenderOutOfMemoryError(str(error).partition(". ")[0]))


def _take_steps(pipe: Connection, name: str, setting: Setting) -> None:
    contender = CONTENDERS[name](setting)
    accelerator = detect(setting.device)
    batches = _batches(setting)
    pipe.send("ready")
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        if command.startswith("peak"):
            pipe.send(_peak_by_cpu_time(setting) if command.endswith("cpu") else _peak(setting))
            continue
        tokens = next(batches)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = contender.step(tokens)
        accelerator.synchronize()
        pipe.send(
            Measured(
                time.perf_counter() - wall,
                time.process_time() - cpu,
                loss,
                accelerator.peak_memory_bytes(),
            )
        )


def _batches(setting: Setting) -> Iterator[torch.Tensor]:
    for seed in itertools.count(SEED):
        generator = torch.Generator().manual_seed(seed)
        shape = (1, setting.seq_length + 1)
        yield torch.randint(setting.model.vocab_size, shape, generator=generator).to(setting.device)


def _peak(setting: Setting) -> float:
    from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
    from spikingbrain_train.training.throughput import measure_peak_tflops

    peak = measure_peak_tflops(setting.device, PARAMS_DTYPE[setting.precision])
    return math.nan if peak is None else peak


def _peak_by_cpu_time(setting: Setting) -> float:
    from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE

    a, b = (torch.randn(2048, 2048).to(PARAMS_DTYPE[setting.precision]) for _ in range(2))
    times = []
    for _ in range(10):
        begin = time.process_time()
        torch.mm(a, b)
        times.append(time.process_time() - begin)
    return 2 * 2048**3 / min(times) / 1e12
