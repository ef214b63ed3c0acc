"""Runs of benchmarks/conversion_quality.py: each a chain of the commands that a user would type, resumable.

What is done lies in the output folder and is not done again; a stopped training goes on from its checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.conversion_methods import CALIBRATION_TOKENS, Conversion, Method, Stage
from benchmarks.conversion_texts import KINDS, json_lines, write_sample
from benchmarks.project_commands import ProjectCommands
from spikingbrain_train.reporting.metrics import read_metrics

WINDOW, SEQ_LENGTH = 512, 2048
_CHOICE_TOKENS = 8192
"""That layers are chosen on; not trained on, and of none of the texts that methods are measured on."""
HELD_OUT_CHARACTERS = 48_000
"""Of each text: about 12k tokens, six windows."""
EVALUATIONS = 4
"""Of a stage."""


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
        held_out_characters: of each text that methods are measured on.
        evaluations: of a stage.
    """

    def __init__(
        self,
        output: Path,
        model: Path,
        train: Path,
        valid: Path,
        device: str,
        deadline: float | None,
        *,
        held_out_characters: int = HELD_OUT_CHARACTERS,
        evaluations: int = EVALUATIONS,
    ) -> None:
        self.output = output
        self.model = model
        self.train_text = train
        self.valid_text = valid
        self.device = device
        self.size = SIZES[device]
        self.held_out_characters = held_out_characters
        self.evaluations = evaluations
        self.commands = ProjectCommands(deadline)
        self.tokens_per_step = self.size.sequences * SEQ_LENGTH
        self.valid = {name: output / "data" / name for name in ("docs", *KINDS)}

    def prepare(self, conversions: Collection[Conversion]) -> None:
        """Whatever runs share: tokens, checkpoints, the dense source's numbers."""
        data = self.output / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._tokenize(self.train_text, data / "train", "--valid-tokens", 2 * _CHOICE_TOKENS)
        for name, prefix in self.valid.items():
            text = data / f"{name}.jsonl"
            if not text.is_file():
                documents = KINDS[name]() if name in KINDS else json_lines(self.valid_text)
                write_sample(documents, text, self.held_out_characters)
            self._tokenize(text, prefix)
        if not (self.output / "dense").is_dir():
            self.commands.run("convert", "import", "--hf", self.model, "--output", self.output / "dense")
        for conversion in sorted(conversions, key=lambda each: each.name):
            folder = self.output / conversion.name
            if not folder.is_dir():
                words = ["convert", "import", "--hf", self.model, "--output", folder]
                self.commands.run(*words, *self._swaps(conversion))
        for name, prefix in self.valid.items():
            report = self.output / "dense_cross_entropy" / f"{name}.json"
            if not report.is_file():
                report.parent.mkdir(exist_ok=True)
                words = ["evaluate", "--model", self.output / "dense", "--data", prefix, "--output", report]
                self.commands.run(*words, "--seq-length", SEQ_LENGTH)

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
        checkpoint, before, curve, seconds = self.output / method.conversion.name, 0, [], 0.0
        for stage, steps in self._steps(method, tokens):
            run = folder / stage.kind
            began = time.monotonic()
            read, is_start = steps * self.tokens_per_step, stage.share == 0
            self._train(method, stage, 0 if is_start else steps, checkpoint, run, seed)
            seconds += time.monotonic() - began
            curve += list(self._curve(run, before + read if is_start else before))
            before += read
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
        """Steps' worth of tokens of each stage; a start reads its own without a step."""
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
        evaluations = 1 if stage.share == 0 else self.evaluations
        self.commands.run(
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

    def _swaps(self, conversion: Conversion) -> list[object]:
        """Words of spikingbrain-convert import."""
        recipe = [f"sliding_window={WINDOW}", f"num_sink_tokens={conversion.sinks}"]
        if not conversion.chosen:
            return ["--conversion", "spikingbrain_7b", f"mixers=[{conversion.mixer},swa]", *recipe]
        choice = self.output / "choice" / conversion.name
        if not (choice / "conversion.yaml").is_file():
            data = self.output / "data"
            words: list[object] = ["choose-layers", "--model", self.model, "--output", choice]
            words += ["--data", data / "train_valid", "--tokens", _CHOICE_TOKENS, "--seq-length", SEQ_LENGTH]
            words += ["--calibration-data", data / "train_train", "--calibration-tokens", CALIBRATION_TOKENS]
            self.commands.run(*words, *recipe)
        return ["--conversion", choice / "conversion.yaml"]

    def _tokenize(self, text: Path, prefix: Path, *split: object) -> None:
        done = Path(f"{prefix}_train.idx" if split else f"{prefix}.idx")
        if not done.is_file():
            words = ["preprocess", "--input", text, "--tokenizer", self.model, "--output-prefix", prefix]
            self.commands.run(*words, *split)
