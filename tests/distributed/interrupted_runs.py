"""train.py under torchrun, ended or stopped at chosen moments, and held to a run that nobody disturbed.

For tests/distributed/test_interrupted_runs.py (a few) and benchmarks/interrupted_runs.py (many).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spikingbrain_train.reporting.metrics import METRICS_FILE, parse_line, read_metrics
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, iteration_folder
from spikingbrain_train.training.callbacks.callback import Callback

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES_FILE = "samples_of_rank_{}.jsonl"
_POLL_SECONDS = 0.01
_PATIENCE_SECONDS = 300.0


class WritesSamples(Callback):
    """Writes down which samples a rank reads for which step, and checksums of their tokens.

    A line each micro-batch; of tensor-parallel ranks, which read the same, the first does.
    """

    def start(self) -> None:
        run: Any = self.run
        if run.groups.tensor_model_parallel_rank > 0:
            return
        path = Path(run.config.output_dir) / SAMPLES_FILE.format(run.groups.rank)
        read = run.data.train_batches

        def train_batches(consumed_samples: int) -> Iterator[Any]:
            for batch in read(consumed_samples):
                numbers = [int(seed.split("/")[1]) for seed in batch.layout.sequence_seeds]
                checksums = [zlib.crc32(row.numpy().tobytes()) for row in batch.tokens]
                samples = list(zip(numbers, checksums, strict=True))
                line = {"process": os.getpid(), "step": run.state.iteration + 1, "samples": samples}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                yield batch

        run.data.train_batches = train_batches


def settings(output: Path, text: Path, *, steps: int, save_interval: int, more: Sequence[str]) -> list[str]:
    """A small deterministic run of four sequences a step, every step of it in the metrics."""
    return [
        *("model=tiny_hybrid", "model.vocab_size=130", "cluster=cpu", "precision=fp32", "parallel=single"),
        *(f"data.train=[{text}]", "stage.seq_length=64", "stage.global_batch_size=4"),
        *(f"output_dir={output}", f"stage.train_iters={steps}", f"checkpoint.save_interval={save_interval}"),
        *("numerics.deterministic=true", "logging.log_interval=1", "logging.tensorboard=false"),
        *("cluster.peak_tflops=1", f"callbacks=[{__name__}.WritesSamples]", *more),
    ]


class Launch:
    """train.py on several ranks under torchrun, which starts them again up to ``restarts`` times.

    Args:
        output: output_dir of the run.
        log: what it prints is added to this file.
        ranks: their number.
        arguments: settings of the run.
        restarts: --max-restarts.
        meeting: more options of torchrun.
        variables: more of its environment.
    """

    def __init__(
        self,
        output: Path,
        log: Path,
        ranks: int,
        arguments: Sequence[str],
        restarts: int = 0,
        meeting: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.output, self.log, self.ranks = output, log, ranks
        launcher = [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *meeting]
        variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(variables or {})}
        log.touch()
        self.process = self._start(
            [*launcher, str(REPOSITORY / "train.py"), *arguments], {**_shell(), **variables}
        )

    def _start(self, words: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """The launcher and its ranks at once, as where a node loses its power."""
        ranks = self.pids().values()
        if self.process.poll() is None:
            self.process.kill()
        for pid in ranks:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> dict[int, int]:
        """Rank -> process id of those that live now."""
        found = {}
        for child in _children(self.process.pid):
            with suppress(OSError):
                for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(variable.removeprefix(b"RANK="))] = child
        return found

    def iteration(self) -> int:
        """The newest step that the metrics have, 0 where they have none."""
        with suppress(OSError):
            lines = (self.output / METRICS_FILE).read_text().splitlines()
            points = (parse_line(line) for line in reversed(lines))
            return next((point["iteration"] for point in points if point and "train/loss" in point), 0)
        return 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or lies there unfinished."""
        return any((self.output / CHECKPOINT_FOLDER).glob(".iter_*.incomplete"))

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """Until it is so; returns False where the run ends before.

        Raises:
            AssertionError: with the end of the log, after some minutes.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not what():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.tail()
            time.sleep(_POLL_SECONDS)
        return True

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


def _shell() -> dict[str, str]:
    """The environment without what tests give themselves and a run has to see to (tests/conftest.py)."""
    return {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}


class Moment(Enum):
    """When a rank is hit."""

    start = "while ranks start"
    step = "in a step"
    save = "while a checkpoint is written"


@dataclass(frozen=True)
class Blow:
    """What happens to a run: at the moment, once ``iteration`` is done, and ``delay`` seconds later."""

    moment: Moment
    iteration: int
    rank: int
    delay: float


_LONGEST_DELAY = {Moment.start: 12.0, Moment.step: 0.3, Moment.save: 0.15}


def random_blows(number: int, *, steps: int, ranks: int, save_interval: int, seed: int) -> list[Blow]:
    """Spread over a run; of ten, four fall into saves, five into steps, one into a start."""
    draw, blows = random.Random(seed), []
    latest = steps - 2 * save_interval
    for index in range(number):
        moment = (Moment.save, Moment.step)[index % 2] if index % 10 != 5 else Moment.start
        iteration = int(latest * (index + draw.random()) / number)
        delay = draw.uniform(0, _LONGEST_DELAY[moment])
        blows.append(Blow(moment, iteration, draw.randrange(ranks), delay))
    return blows


def await_blow(launch: Launch, blow: Blow, before: dict[int, int]) -> bool:
    """Until it is time for it; returns False where the run ends before.

    Args:
        launch: the run.
        blow: what is to come.
        before: processes of ranks before the last blow, which are no longer meant.
    """

    def is_up() -> bool:
        now = launch.pids()
        return len(now) == launch.ranks and not set(now.values()) & set(before.values())

    if not launch.wait_for(is_up):
        return False
    seen = launch.iteration()
    if blow.moment is not Moment.start:

        def is_time() -> bool:
            done = launch.iteration()
            if done != seen:
                moved.append(done)
            return bool(moved) and done >= blow.iteration

        moved: list[int] = []
        if not launch.wait_for(is_time):
            return False
    if blow.moment is Moment.save:
        if not launch.wait_for(lambda: not launch.is_saving()):  # what a killed run left goes with the next
            return False
        if not launch.wait_for(launch.is_saving):
            return False
    time.sleep(blow.delay)
    return launch.process.poll() is None


@dataclass(frozen=True)
class Hit:
    """A blow that fell."""

    blow: Blow
    iteration: int
    """The newest step in the metrics at that moment."""
    was_saving: bool
    """Whether a checkpoint lay there unfinished right behind it."""
    children: tuple[int, ...] = ()
    """Processes that the rank had started."""


def kill_ranks(launch: Launch, blows: Sequence[Blow], tell: Callable[[Hit], None]) -> list[Hit]:
    """kill -9 of one rank after the other; torchrun starts all of them again. Returns at the last."""
    hits: list[Hit] = []
    before: dict[int, int] = {}
    for blow in blows:
        if not await_blow(launch, blow, before):
            break
        before = launch.pids()
        children = _children(before[blow.rank])
        os.kill(before[blow.rank], signal.SIGKILL)
        hits.append(Hit(blow, launch.iteration(), launch.is_saving(), children))
        tell(hits[-1])
    return hits


def _children(pid: int) -> tuple[int, ...]:
    """Processes that one has started, and that live."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return tuple(found)


def differences(disturbed: Path, undisturbed: Path, *, steps: int, ranks: int) -> list[str]:
    """What tells a run from one that nobody disturbed: nothing, if it is as it should be.

    Compared are all tensors of the last checkpoints (weights, main weights, moments), bit by bit, the losses
    and gradient norms of every step, and which samples were read for it.
    """
    import torch

    from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader

    found = []
    readers = []
    for output in (disturbed, undisturbed):
        checkpoint = iteration_folder(output / CHECKPOINT_FOLDER, steps)
        if not checkpoint.is_dir():
            return [f"{checkpoint} is not there"]
        readers.append(MegatronCheckpointReader(checkpoint))
    got, wanted = readers
    if got.tensors.keys() != wanted.tensors.keys():
        found.append("the checkpoints hold other tensors")
    else:
        found += [
            f"{name} differs" for name in got.tensors if not torch.equal(got.read(name), wanted.read(name))
        ]
    curves = []
    for output in (disturbed, undisturbed):
        names = ("iteration", "train/loss", "train/grad_norm")
        points = [point for point in read_metrics(output) if "train/loss" in point]
        curves.append([tuple(point[name] for name in names) for point in points])
    if curves[0] != curves[1] or [point[0] for point in curves[1]] != list(range(1, steps + 1)):
        found.append("the curves differ")
    if samples_by_step(disturbed, ranks) != samples_by_step(undisturbed, ranks):
        found.append("steps have read other samples")
    counts = Counter(each for step in samples_by_step(disturbed, ranks).values() for each, _ in step)
    if sorted(counts) != list(range(len(counts))) or set(counts.values()) != {1}:
        found.append("samples were lost or read twice")
    return found


def samples_by_step(output: Path, ranks: int) -> dict[int, list[list[int]]]:
    """Step -> the samples that all ranks read for it in the last attempt, each with a checksum."""
    found: dict[int, list[list[int]]] = {}
    for rank in range(ranks):
        path = output / SAMPLES_FILE.format(rank)
        of_rank: dict[int, dict[int, list[list[int]]]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # a kill may cut a line short
                read = json.loads(line)
                attempts = of_rank.setdefault(read["step"], {})
                last = attempts.pop(read["process"], [])
                attempts[read["process"]] = last + read["samples"]
        for step, attempts in of_rank.items():
            found.setdefault(step, []).extend(list(attempts.values())[-1])
    return {step: sorted(samples) for step, samples in sorted(found.items())}
