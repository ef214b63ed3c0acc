"""Runs of benchmarks/conversion_quality.py: each a chain of the commands that a user would type, resumable.

What is done lies in the output folder and is not done again; a stopped training goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.conversion_methods import CALIBRATION_TOKENS, CHOSEN, Method, Stage
from benchmarks.conversion_texts import KINDS, json_lines, write_sample
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.reporting.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
WINDOW, SEQ_LENGTH = 512, 2048
_ASKED_TO_STOP = 75
"""Exit code of a training that has saved because it was asked to stop."""
_CHOICE_TOKENS = 8192
"""That layers are chosen on; not trained on, and of none of the texts that methods are measured on."""
_HELD_OUT_CHARACTERS = 48_000
"""Of each text: about 12k tokens, six windows."""


class OutOfTimeError(Exception):
    """The minutes of this call are over; the next call goes on."""


class FailedCommandError(SpikingBrainError):
    """A command of a chain did not end well."""


@dataclass(frozen=True)
class Size:
    """How the batches of a device are made."""

    sequences: int
    """Of an optimizer step."""
    micro_batch: int
    """Of a pass of the device."""


SIZES = {"cpu": Size(1, 1), "cuda": Size(32, 8)}


class Bench:
    """The models and texts that all runs share.

    Args:
        output: folder of everything.
        model: Hugging Face folder of the dense source.
        train: text to train on.
        valid: held-out text of the same kinds.
        device: cpu or cuda.
        deadline: ``time.monotonic()`` at which to stop; None goes on to the end.
    """

    def __init__(
        self, output: Path, model: Path, train: Path, valid: Path, device: str, deadline: float | None
    ) -> None:
        self.output = output
        self.model = model
        self.train_text = train
        self.valid_text = valid
        self.device = device
        self.size = SIZES[device]
        self.deadline = deadline
        self.tokens_per_step = self.size.sequences * SEQ_LENGTH
        self.valid = {name: output / "data" / name for name in ("docs", *KINDS)}

    def prepare(self, layers: Sequence[str]) -> None:
        """Whatever runs share: tokens, checkpoints (``layers`` swapped), the dense source's numbers."""
        data = self.output / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._tokenize(self.train_text, data / "train", "--valid-tokens", 2 * _CHOICE_TOKENS)
        for name, prefix in self.valid.items():
            text = data / f"{name}.jsonl"
            if not text.is_file():
                documents = KINDS[name]() if name in KINDS else json_lines(self.valid_text)
                write_sample(documents, text, _HELD_OUT_CHARACTERS)
            self._tokenize(text, prefix)
        if not (self.output / "dense").is_dir():
            self._run("convert", "import", "--hf", self.model, "--output", self.output / "dense")
        for name in layers:
            if not (self.output / name).is_dir():
                words = ["convert", "import", "--hf", self.model, "--output", self.output / name]
                self._run(*words, *self._conversion(name))
        for name, prefix in self.valid.items():
            report = self.output / "dense_cross_entropy" / f"{name}.json"
            if not report.is_file():
                report.parent.mkdir(exist_ok=True)
                words = ["evaluate", "--model", self.output / "dense", "--data", prefix, "--output", report]
                self._run(*words, "--seq-length", SEQ_LENGTH)

    def dense(self) -> dict[str, float]:
        """Cross entropy of the dense source on each text."""
        return {
            name: json.loads((self.output / "dense_cross_entropy" / f"{name}.json").read_text())[
                "cross_entropy"
            ]
            for name in self.valid
        }

    def run(self, method: Method, tokens: int, seed: int) -> dict[str, Any]:
        """Take a method through all of its stages, or read what it gave.

        Args:
            tokens: of all stages, calibration included.
            seed: of the order of the text, and of new weights.

        Returns:
            Its curve: ``[[tokens, {text: cross entropy}], ...]``, and the seconds of training.

        Raises:
            OutOfTimeError: go on with another call.
        """
        folder = self.output / "runs" / f"{method.name}-{tokens}-{seed}"
        result = folder / "result.json"
        if result.is_file():
            return json.loads(result.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, before, curve, seconds = self.output / method.layers, 0, [], 0.0
        for stage, steps in self._steps(method, tokens):
            run = folder / stage.kind
            began = time.monotonic()
            self._train(method, stage, steps, checkpoint, run, seed)
            seconds += time.monotonic() - began
            curve += list(self._curve(run, before))
            before += steps * self.tokens_per_step
            checkpoint = run / "checkpoints"
        done = {
            "method": method.name,
            "tokens": tokens,
            "seed": seed,
            "curve": curve,
            "seconds": round(seconds),
        }
        temporary = result.with_suffix(".tmp")
        temporary.write_text(json.dumps(done))
        temporary.replace(result)
        for weights in folder.glob("*/checkpoints"):
            if weights != checkpoint:
                subprocess.run(["rm", "-r", "--", str(weights)], check=True)
        return done

    def _steps(self, method: Method, tokens: int) -> Iterator[tuple[Stage, int]]:
        """Optimizer steps of each stage; a start alone reads its tokens in steps without a rate."""
        starts = [stage for stage in method.stages if stage.share == 0]
        left = tokens - CALIBRATION_TOKENS * len(starts)
        for stage in method.stages:
            wanted = CALIBRATION_TOKENS if stage.share == 0 else left * stage.share
            if wanted >= 1:
                yield stage, max(1, round(wanted / self.tokens_per_step))

    def _train(
        self, method: Method, stage: Stage, steps: int, checkpoint: Path, run: Path, seed: int
    ) -> None:
        learns = [] if stage.kind == "cpt" else [f"stage.teacher={self.output / 'dense'}"]
        valid = ",".join(str(prefix) for prefix in self.valid.values())
        evaluations = 1 if stage.share == 0 else 4
        self._run(
            "train",
            f"stage={stage.kind}",
            f"cluster={'cpu' if self.device == 'cpu' else 'auto'}",
            *learns,
            f"checkpoint.load={checkpoint}",
            f"checkpoint.save_interval={max(1, steps // 4)}",
            "checkpoint.keep_last=1",
            f"stage.train_iters={steps}",
            f"stage.seq_length={SEQ_LENGTH}",
            f"stage.micro_batch_size={self.size.micro_batch}",
            f"stage.global_batch_size={self.size.sequences}",
            f"optimizer.lr_warmup_iters={min(10, steps // 4)}",
            *stage.settings,
            f"data.train=[{self.output / 'data' / 'train_train'}]",
            f"data.valid=[{valid}]",
            f"logging.eval_interval={max(1, steps // evaluations)}",
            f"logging.eval_iters={10**6}",
            "logging.tensorboard=false",
            f"seed={seed}",
            f"output_dir={run}",
        )

    def _curve(self, run: Path, before: int) -> Iterator[list[Any]]:
        for point in read_metrics(run):
            if "valid/cross_entropy" in point:
                prefix = "valid/cross_entropy/"
                of_texts = {
                    key.removeprefix(prefix): value for key, value in point.items() if key.startswith(prefix)
                }
                yield [before + point["iteration"] * self.tokens_per_step, of_texts]

    def _conversion(self, name: str) -> list[object]:
        """Words of spikingbrain-convert import that swap the layers of ``name``."""
        if name != CHOSEN:
            return ["--conversion", "spikingbrain_7b", f"sliding_window={WINDOW}", "mixers=[gla,swa]"]
        choice = self.output / "choice"
        if not (choice / "conversion.yaml").is_file():
            data = self.output / "data"
            words: list[object] = ["choose-layers", "--model", self.model, "--output", choice]
            words += ["--data", data / "train_valid", "--tokens", _CHOICE_TOKENS, "--seq-length", SEQ_LENGTH]
            words += ["--calibration-data", data / "train_train", "--calibration-tokens", CALIBRATION_TOKENS]
            self._run(*words, f"sliding_window={WINDOW}")
        return ["--conversion", choice / "conversion.yaml"]

    def _tokenize(self, text: Path, prefix: Path, *split: object) -> None:
        done = Path(f"{prefix}_train.idx" if split else f"{prefix}.idx")
        if not done.is_file():
            words = ["preprocess", "--input", text, "--tokenizer", self.model, "--output-prefix", prefix]
            self._run(*words, *split)

    def _run(self, *words: object) -> None:
        """Run a command of this project; ask it to stop when the time is over."""
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise OutOfTimeError
        command = [sys.executable, "-m", "spikingbrain_train", *(str(word) for word in words)]
        print(
            "$", " ".join(["spikingbrain-" + str(words[0]), *(str(word) for word in words[1:])]), flush=True
        )
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise OutOfTimeError from None
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if code == _ASKED_TO_STOP:
            raise OutOfTimeError
        if code:
            raise FailedCommandError(
                f"spikingbrain-{words[0]} ended with exit code {code}; see what it says above"
            )
