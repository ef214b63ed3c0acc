"""Claim: a run whose ranks are killed, or that is asked to stop, ends as one that nobody disturbed.

    python benchmarks/interrupted_runs.py kills --number 30 --seed 1
    python benchmarks/interrupted_runs.py signals --number 10 --seed 1

Real processes: train.py on four ranks under torchrun, tensor parallel 2, data parallel 2, deterministic.
``kills`` sends kill -9 to random ranks at random moments (of ten, four fall into saves, five into steps, one
into a start), and --max-restarts starts all ranks again; every sixth time torchrun and all ranks are killed
together, as where the machine loses its power, and the same command goes on. ``signals`` sends SIGTERM to
torchrun, waits for the end and starts it again. Then all tensors of the last checkpoint are compared, bit by
bit, with those of an undisturbed run, and the curves, and which samples were read for which step. Exit code 1
where any differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings  # noqa: E402

ignore_megatron_warnings()  # before megatron-core

from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_iteration  # noqa: E402
from tests.distributed.interrupted_runs import (  # noqa: E402
    Blow,
    Hit,
    Launch,
    Moment,
    await_blow,
    differences,
    kill_ranks,
    random_blows,
    settings,
)
from tests.distributed.small_runs import write_text  # noqa: E402

SMALL = [
    *("model.num_layers=2", "model.mixers=[gla,full]"),
    *("parallel.tensor_model_parallel_size=2", "parallel.use_distributed_optimizer=true"),
]
GO_ON = 75


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("how", choices=("kills", "signals"))
    parser.add_argument("--number", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--save-interval", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=4, help="an even number (default: %(default)s)")
    parser.add_argument("--async-save", action="store_true", help="steps go on while checkpoints are written")
    parser.add_argument("--kills-per-launch", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="keep runs here; the same command again goes on")
    parser.add_argument("--minutes", type=float, help="begin nothing after so long (exit code 75)")
    arguments = parser.parse_args()
    if arguments.minutes is not None and arguments.output is None:
        parser.error("--minutes needs --output, to go on from")
    with ExitStack() as stack:
        folder = arguments.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sys.exit(Interruptions(arguments, folder.resolve()).measure())


class Interruptions:
    """An undisturbed run, a disturbed one, and the comparison."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.text = folder / "assignment"
        if not (folder / "assignment.idx").exists():
            write_text(folder)
        self.disturbed, self.undisturbed = folder / "disturbed", folder / "undisturbed"
        self.steps, self.ranks = arguments.steps, arguments.ranks
        # A rank that is lost is named after 2.5 twelfths of this; and no collective here takes long.
        self.more = [*SMALL, "cluster.timeout_minutes=0.5", "checkpoint.keep_last=3"]
        if arguments.async_save:
            self.more += ["checkpoint.async_save=true"]
        self.began = time.monotonic()
        self.failures: list[str] = []
        self.file = folder / "hits.jsonl"
        """A line each blow that fell, with which another call goes on."""

    def measure(self) -> int:
        """Run both, print a row of the table; returns the exit code."""
        if latest_iteration(self.undisturbed / CHECKPOINT_FOLDER) != self.steps:
            with self.launch(self.undisturbed) as launch:
                launch.process.wait()
                assert launch.process.returncode == 0, launch.tail()
            self.say("undisturbed run done")
        interrupt = self.kill if self.arguments.how == "kills" else self.ask_to_stop
        while len(self.hits()) < self.arguments.number and not self.failures:
            if self.is_over():
                return GO_ON
            interrupt()
        if self.is_over():
            return GO_ON
        with self.launch(self.disturbed) as launch:
            launch.process.wait()
            if launch.process.returncode != 0:
                self.fail(launch, f"torchrun ended with {launch.process.returncode}")
        self.failures += differences(self.disturbed, self.undisturbed, steps=self.steps, ranks=self.ranks)
        how = "asynchronous" if self.arguments.async_save else "synchronous"
        result = "; ".join(self.failures) or "bit-identical, each sample once"
        print("| run | saves | seed | what happened | against the undisturbed run |")
        print("| --- | --- | --- | --- | --- |")
        print(
            f"| {self.steps} steps, {self.ranks} ranks | {how}, every {self.arguments.save_interval} | "
            f"{self.arguments.seed} | {self.summary()} | {result} |"
        )
        return 1 if self.failures else 0

    def launch(self, output: Path, restarts: int = 0) -> Launch:
        """Start a run."""
        words = settings(
            output,
            self.text,
            steps=self.steps,
            save_interval=self.arguments.save_interval,
            more=self.more,
        )
        return Launch(output, self.folder / f"{output.name}.log", self.ranks, words, restarts)

    def hits(self) -> list[dict[str, Any]]:
        """What has fallen so far, in this call and others."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]

    def left(self) -> list[Blow]:
        """The moments that are still to come, drawn with the seed."""
        options = self.arguments
        blows = random_blows(
            options.number,
            steps=self.steps,
            ranks=self.ranks,
            save_interval=options.save_interval,
            seed=options.seed,
        )
        return blows[len(self.hits()) :]

    def kill(self) -> None:
        """kill -9 of ranks, all of which torchrun starts again; the last one takes torchrun along."""
        blows = self.left()[: self.arguments.kills_per_launch]
        with self.launch(self.disturbed, restarts=len(blows)) as launch:
            hits = kill_ranks(launch, blows, self.tell)
        if len(hits) < len(blows):
            self.fail(launch, f"torchrun ended with {launch.process.returncode} before a kill")

    def tell(self, hit: Hit, **more: Any) -> None:
        """Write down and say what has happened."""
        blow = hit.blow
        line = {
            "moment": blow.moment.value,
            "rank": blow.rank,
            "iteration": hit.iteration,
            "left_unfinished": hit.was_saving,
            **more,
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say(f"{len(self.hits())}/{self.arguments.number}: {json.dumps(line)}")

    def ask_to_stop(self) -> None:
        """SIGTERM to torchrun, which the next call starts again."""
        blow = self.left()[0]
        before = latest_iteration(self.disturbed / CHECKPOINT_FOLDER) or 0
        with self.launch(self.disturbed) as launch:
            if not await_blow(launch, blow, {}):
                self.fail(launch, "the run ended before a signal")
                return
            hit = Hit(blow, launch.iteration(), launch.is_saving())
            launch.process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            launch.process.wait()
            took = time.monotonic() - sent
        saved = latest_iteration(self.disturbed / CHECKPOINT_FOLDER) or 0
        self.tell(hit, saved=saved, seconds=round(took, 1))
        is_held = saved >= hit.iteration or (blow.moment is Moment.start and saved == before)
        if launch.process.returncode == 0 or not is_held:
            self.fail(launch, f"a signal came at iteration {hit.iteration}, and {saved} is saved")

    def summary(self) -> str:
        """What has happened, in words."""
        hits = self.hits()
        moments = Counter(hit["moment"] for hit in hits)
        parts = ", ".join(f"{count} {moment}" for moment, count in moments.items())
        unfinished = sum(hit["left_unfinished"] for hit in hits)
        if self.arguments.how == "kills":
            return f"{len(hits)} kills ({parts}); {unfinished} left a checkpoint unfinished"
        lost = sum(hit["saved"] < hit["iteration"] for hit in hits)
        slowest = max(hit["seconds"] for hit in hits)
        return f"{len(hits)} times SIGTERM ({parts}); {lost} lost a step; ended after {slowest} s at most"

    def is_over(self) -> bool:
        """Whether the minutes of this call are."""
        minutes = self.arguments.minutes
        is_over = minutes is not None and time.monotonic() - self.began > 60 * minutes
        if is_over:
            self.say("the minutes are over; the same command goes on")
        return is_over

    def fail(self, launch: Launch, what: str) -> None:
        """Remember what went wrong, and show the end of the log."""
        self.failures.append(what)
        print(launch.tail(), flush=True)

    def say(self, what: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.began:6.0f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
