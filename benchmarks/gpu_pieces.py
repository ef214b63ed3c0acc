"""What benchmarks/gpu.py measures, in pieces that a loan of a GPU has minutes for.

A piece is made of cells, each measured in processes of its own: what is there stays, whether the minutes or
the GPU's memory end first, and the next call goes on with the cells that are missing.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from benchmarks.project_commands import FailedCommandError, OutOfTimeError, ProjectCommands
from benchmarks.training_contenders import OURS, PEERS, ContenderOutOfMemoryError, ContenderProcess, Setting
from benchmarks.training_step import LOSS_BOUND, step_flops
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.fp8 import Fp8Recipe
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.fit import DeviceMemory, device_memory
from spikingbrain_train.planning.known_peaks import known_peak_tflops
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.planner import Plan, plan_run
from spikingbrain_train.reporting.metrics import read_metrics

STEPS = 5
"""Optimizer steps of a contender that count, behind a first one that builds and tunes kernels."""
REPEATS = 10
"""Turns of a kernel that count."""
LOSS_STEPS = 8
"""Steps of each stage of the demo that are taken on both devices."""
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}

Row = dict[str, Any]


@dataclass(frozen=True)
class Loan:
    """What a call may use."""

    output: Path
    """Folder of everything."""
    deadline: float
    """``time.monotonic()`` at which its minutes are over."""
    source: Path | None = None
    """The demo's dense model; None downloads it."""
    device: str = "cuda"


Keep = Callable[[Row], None]
"""Takes what is measured of a cell so far."""


class Piece(Protocol):
    """A part of the measurements that fits into the minutes of a call."""

    @property
    def name(self) -> str:
        """What ``--piece`` calls it."""

    @property
    def cells(self) -> list[str]:
        """What it measures, in this order."""

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        """What it would do, composed and planned, for a GPU with that much memory; needs none.

        Raises:
            ConfigurationError: its configuration does not compose.
        """

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        """Measure a cell.

        Raises:
            OutOfTimeError: at the deadline; what was kept counts.
            ContenderOutOfMemoryError: the GPU has too little memory for it.
        """


def _rows_of(function: Callable[..., Iterator[Row]], arguments: tuple[Any, ...], loan: Loan) -> Iterator[Row]:
    """The rows that a generator gives in a process of its own, which ends with the minutes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_rows, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(max(0.0, loan.deadline - time.monotonic())):
                raise OutOfTimeError
            try:
                row = ours.recv()
            except EOFError:
                process.join()
                raise SystemExit(
                    f"error: {function.__name__} ended with exit code {process.exitcode}"
                ) from None
            if row is None:
                return
            yield row
    finally:
        process.kill()
        process.join()


def _send_rows(pipe: Connection, function: Callable[..., Iterator[Row]], arguments: tuple[Any, ...]) -> None:
    for row in function(*arguments):
        pipe.send(row)
    pipe.send(None)


def _keep_rows(
    name: str, function: Callable[..., Iterator[Row]], arguments: tuple[Any, ...], loan: Loan, keep: Keep
) -> None:
    """Keep under ``name`` what a process of its own has found, row by row."""
    rows: list[Row] = []
    for row in _rows_of(function, arguments, loan):
        rows.append(row)
        keep({name: rows})


def _errors() -> Iterator[Row]:
    from benchmarks.gpu_ops import errors_against_naive, require_gpu_and_fla

    require_gpu_and_fla()
    yield from errors_against_naive()


def _times(op: str, tokens: int) -> Iterator[Row]:
    from benchmarks.gpu_ops import compare, require_gpu_and_fla

    require_gpu_and_fla()
    yield from compare(op, tokens, REPEATS)


def _fp8_times(op: str, tokens: int) -> Iterator[Row]:
    from benchmarks.gpu_fp8 import CASES
    from benchmarks.gpu_ops import compare

    yield from compare(op, tokens, REPEATS, CASES)


@dataclass(frozen=True)
class KernelErrors:
    """Every kernel against the naive forms in float64."""

    name: str = "kernel-errors"

    @property
    def cells(self) -> list[str]:
        return ["errors"]

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        yield "outputs and gradients of every kernel against the naive forms, bf16, 2048 tokens"

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        _keep_rows("errors", _errors, (), loan, keep)


@dataclass(frozen=True)
class KernelTimes:
    """Our ops beside fla, flash-attn, SDPA and cuBLAS."""

    name: str
    tokens: int

    @property
    def cells(self) -> list[str]:
        from benchmarks.gpu_ops import CASES

        return list(CASES)

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        from benchmarks.gpu_ops import D, G, H

        yield (
            f"forward and backward in bf16 over {self.tokens} tokens, {H} heads in {G} groups of width {D}: "
            f"{', '.join(self.cells)}"
        )

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        _keep_rows("times", _times, (cell, self.tokens), loan, keep)


@dataclass(frozen=True)
class Fp8Products:
    """The linears of a layer in FP8 beside themselves in bf16 and cuBLAS."""

    name: str
    tokens: int

    @property
    def cells(self) -> list[str]:
        from benchmarks.gpu_fp8 import CASES

        return list(CASES)

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        yield (
            f"forward and backward of linears as wide as the 7B's over {self.tokens} tokens, in FP8 with "
            f"each recipe of the GPU and in bf16; needs Transformer Engine: {', '.join(self.cells)}"
        )

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        _keep_rows("times", _fp8_times, (cell, self.tokens), loan, keep)


@dataclass(frozen=True)
class TrainingSteps:
    """Tokens/s, MFU and peak memory of a training step, beside transformers where there is time for it."""

    name: str
    model: str
    tokens: int
    recompute: Recompute = Recompute.none
    layers: int | None = None
    """Of a stack that is cut; None takes all."""
    peers: tuple[str, ...] = ()
    fp8: Fp8Recipe | None = None
    """Of ours; None multiplies in bf16."""

    @property
    def cells(self) -> list[str]:
        return [OURS, *(PEERS[peer] for peer in self.peers)]

    @property
    def overrides(self) -> list[str]:
        """The run as its plan is asked for."""
        words = [f"model={self.model}", "stage=cpt", "cluster=nvidia", "precision=bf16"]
        words += [f"stage.seq_length={self.tokens}", "stage.micro_batch_size=1", "stage.global_batch_size=1"]
        words += [f"parallel.recompute={self.recompute.value}", "output_dir=unused", "stage.train_iters=1"]
        words += [f"model.max_position_embeddings={max(LENGTHS.values())}"]
        words += [] if self.layers is None else [f"model.num_layers={self.layers}"]
        words += [] if self.fp8 is None else ["fp8.format=hybrid", f"fp8.recipe={self.fp8.value}"]
        return words

    @cached_property
    def config(self) -> RunConfig:
        """Composed and checked.

        Raises:
            ConfigurationError: it is no run.
        """
        config = to_run_config(compose_run([*self.overrides, "dry_run=true"]))
        check_run_config(config, 1)
        return config

    @property
    def setting(self) -> Setting:
        """What contenders are told."""
        return Setting(
            model=self.config.model,
            hf_folder=None,
            megatron_folder=None,
            weights=None,
            seq_length=self.tokens,
            threads=1,
            device="cuda",
            precision=Precision.bf16,
            recompute=self.recompute,
            fp8=self.config.fp8,
        )

    @property
    def plan(self) -> Plan:
        """Of the very run whose steps are taken."""
        return plan_run(self.setting.run_config, 1)

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        assert self.config.model.num_layers, "composed"
        needed = self.plan.fullest.memory.total
        fit = "" if memory is None else f" of {memory.bytes / GIB:.1f}: {memory.fit(needed).value}"
        yield f"a step of each of: {', '.join(self.cells)}; estimated memory {needed / GIB:.1f} GiB{fit}"
        yield "$ spikingbrain-plan " + shlex.join(self.overrides)

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        setting = replace(self.setting, device=loan.device)
        row: Row = {
            "model": self.model if self.fp8 is None else f"{self.model} in FP8, {self.fp8.value}",
            "layers": self.config.model.num_layers,
            "tokens": self.tokens,
            "recompute": self.recompute.value,
            "contender": cell,
            "step_flops": step_flops(cell, self.config.model, self.tokens),
            "seconds": [],
        }
        if cell == OURS:
            row["planned_gib"] = self.plan.fullest.memory.total / GIB
        keep(row)
        with ContenderProcess(cell, setting, loan.deadline) as process:
            first = process.step()
            row["first_step_seconds"] = first.seconds
            row["peak_gib"] = first.peak_bytes / GIB
            keep(row)
            for _ in range(STEPS):
                measured = process.step()
                row["seconds"].append(measured.seconds)
                row["peak_gib"] = measured.peak_bytes / GIB
                keep(row)
            row["product_tflops"] = process.peak_tflops("wall")
            keep(row)


@dataclass(frozen=True)
class DemoLosses:
    """The demo on the GPU, and the first steps of its stages again on the CPU and on the GPU."""

    name: str = "demo"

    @property
    def cells(self) -> list[str]:
        return ["demo", "losses"]

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        yield (
            f"the demo, then {LOSS_STEPS} steps of its align and cpt stages on CPU and GPU: losses within "
            f"{LOSS_BOUND:g}"
        )
        folder = Path("OUTPUT")
        yield "$ spikingbrain-demo " + shlex.join(self._demo(folder, Path("MODEL")))
        for device in ("cpu", "cuda"):
            for stage in ("align", "cpt"):
                words = self._train(folder, device, stage)
                # What the demo makes is not there yet: the model is named instead of read.
                to_run_config(compose_run([*words, "model=smollm2_135m_hybrid", "checkpoint.load=null"]))
                yield "$ spikingbrain-train " + shlex.join(words)

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        commands = ProjectCommands(loan.deadline)
        if cell == "demo":
            started = time.monotonic()
            commands.run("demo", *self._demo(loan.output, loan.source))
            keep({"demo_seconds": time.monotonic() - started})
            return
        losses: dict[str, dict[str, list[float]]] = {}
        for device in ("cuda", "cpu"):
            for stage in ("align", "cpt"):
                commands.run("train", *self._train(loan.output, device, stage))
                points = read_metrics(self._run(loan.output, device, stage))
                losses.setdefault(stage, {})[device] = [
                    point["train/loss"] for point in points if "train/loss" in point
                ]
                keep({"losses": losses})

    @staticmethod
    def _demo(output: Path, source: Path | None) -> list[str]:
        return ["--output", f"{output}/demo"] + ([] if source is None else ["--model", str(source)])

    @staticmethod
    def _run(output: Path, device: str, stage: str) -> Path:
        return output / "losses" / device / stage

    def _train(self, output: Path, device: str, stage: str) -> list[str]:
        """Settings of a stage whose first steps are taken on one device."""
        demo, load = output / "demo", self._run(output, device, "align") / "checkpoints"
        return [
            f"experiment=smollm2_{stage}",
            f"checkpoint.load={demo / 'hybrid' if stage == 'align' else load}",
            f"stage.teacher={demo}/dense",
            f"data.train=[{demo}/data/text_train]",
            "data.valid=[]",
            f"cluster={'cpu' if device == 'cpu' else 'nvidia'}",
            "precision=bf16",
            f"stage.train_iters={LOSS_STEPS}",
            "logging.log_interval=1",
            f"output_dir={self._run(output, device, stage)}",
        ]


def _training_steps() -> Iterator[TrainingSteps]:
    """135M, 1B and a stack of four layers as wide as the 7B; at 128k layers are computed again."""
    for label, model, layers, peers in (
        ("135m", "smollm2_135m_hybrid", None, ("autocast", "bf16")),
        ("1b", "hybrid_1b", None, ("autocast", "bf16")),
        ("7b", "spikingbrain_7b", 4, ()),
    ):
        for length, tokens in LENGTHS.items():
            recompute = Recompute.full if length == "128k" else Recompute.none
            contend = peers if length == "8k" else ()
            yield TrainingSteps(f"step-{label}-{length}", model, tokens, recompute, layers, contend)


def _fp8() -> Iterator[Piece]:
    """What FP8 is worth, by itself and in a step, whose bf16 twin is step-7b-8k."""
    yield Fp8Products("fp8-8k", LENGTHS["8k"])
    for recipe in (Fp8Recipe.tensorwise, Fp8Recipe.blockwise):
        name = f"step-7b-8k-fp8-{recipe.value}"
        yield TrainingSteps(name, "spikingbrain_7b", LENGTHS["8k"], layers=4, fp8=recipe)


def _all() -> Iterator[Piece]:
    yield KernelErrors()
    for label, tokens in LENGTHS.items():
        yield KernelTimes(f"kernels-{label}", tokens)
    yield DemoLosses()
    yield from _training_steps()
    yield from _fp8()


PIECES: dict[str, Piece] = {piece.name: piece for piece in _all()}


@dataclass
class Results:
    """What is there of a piece, in ``<output>/<piece>.json``."""

    file: Path
    cells: dict[str, Row]
    """By name, whole ones and those whose minutes ended first; a whole one has ``complete``."""
    machine: dict[str, str]

    @classmethod
    def read(cls, output: Path, piece: str) -> Results:
        """Those of earlier calls.

        Raises:
            ConfigurationError: the file is damaged.
        """
        file = output / f"{piece}.json"
        if not file.exists():
            return cls(file, {}, {})
        try:
            stored = json.loads(file.read_text())
            return cls(file, dict(stored["cells"]), dict(stored["machine"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{file} is not what this benchmark has written; remove it") from None

    def write(self) -> None:
        """Replace the file."""
        from spikingbrain_train.storage.durable_files import write_text_durably

        text = json.dumps({"piece": self.file.stem, "machine": self.machine, "cells": self.cells}, indent=1)
        write_text_durably(self.file, text + "\n")

    def missing(self, piece: Piece) -> list[str]:
        """Cells that are not whole."""
        return [cell for cell in piece.cells if "complete" not in self.cells.get(cell, {})]


def run_piece(piece: Piece, loan: Loan, machine: dict[str, str]) -> bool:
    """Measure what is missing of a piece until the minutes are over.

    Returns:
        Whether it is whole.

    Raises:
        ConfigurationError: results of another machine are in the folder.
    """
    results = Results.read(loan.output, piece.name)
    if results.cells and results.machine != machine:
        raise ConfigurationError(
            f"{results.file} was measured on another machine or with other versions "
            f"({', '.join(results.machine.values())}); choose another --output"
        )
    results.machine = machine
    for cell in results.missing(piece):
        earlier = results.cells.get(cell, {})

        def keep(row: Row, cell: str = cell, earlier: Row = earlier) -> None:
            if _numbers(row) >= _numbers(earlier):  # else what an earlier call was cut off in is more
                results.cells[cell] = row
                results.write()

        print(f"{piece.name}: {cell}", flush=True)
        try:
            piece.measure(cell, loan, keep)
        except OutOfTimeError:
            return False
        except ContenderOutOfMemoryError as error:
            results.cells[cell] = {**results.cells.get(cell, {}), "failed": f"out of memory ({error})"}
        except (FailedCommandError, SystemExit) as error:  # no reason to leave other pieces out
            print(f"{piece.name}: {cell}: {error}", flush=True)
            return False
        results.cells[cell] = {**results.cells.get(cell, {}), "complete": True}
        results.write()
    return True


def _numbers(row: Row) -> int:
    """How much is measured in a cell."""
    return sum(len(value) for value in row.values() if isinstance(value, list | dict))


def best_seconds(row: Row) -> float | None:
    """The best step of a cell of :class:`TrainingSteps`; None where only the first was taken."""
    return min(row["seconds"], default=None)


def median_seconds(row: Row) -> float | None:
    """The step in the middle."""
    return statistics.median(row["seconds"]) if row["seconds"] else None


def stated_memory(gib: float | None) -> DeviceMemory | None:
    """The memory a dry run plans for: as stated, else that of an H200."""
    if gib is not None:
        return DeviceMemory(gib * GIB, f"--memory-gib {gib:g}")
    run = compose_run(["cluster=h200", "model=hybrid_1b", "output_dir=unused"])
    return device_memory(to_run_config(run).cluster, 1)


def stated_peak(machine: dict[str, str]) -> float | None:
    """TFLOP/s in bf16 that the GPU of results is sold for."""
    return known_peak_tflops(machine.get("device", ""))
