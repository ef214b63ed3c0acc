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

from benchmarks.conversion_methods import CALIBRATION_TOKENS, SEQ_LENGTH, Conversion, Method, Stage
from benchmarks.conversion_texts import KINDS, check_unseen, json_lines, write_sample
from benchmarks.project_commands import ProjectCommands
from spikingbrain_train.reporting.metrics import read_metrics

WINDOW = 512
_TOKENS_FOR_CHOICES = 16384
"""Kept apart for choices of layers; not trained on, and of none of the texts that methods are measured on."""
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
        self.valid = {name: output / "data" / name for name in ("docs", *KINDS)}

    def prepare(self, conversions: Collection[Conversion]) -> None:
        """Whatever runs share: tokens, checkpoints, the dense source's numbers."""
        data = self.output / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._tokenize(self.train_text, data / "train", "--valid-tokens", _TOKENS_FOR_CHOICES)
        for name, prefix in self.valid.items():
            text = data / f"{name}.jsonl"
            if not text.is_file():
                documents = KINDS[name]() if name in KINDS else json_lines(self.valid_text)
                written = text.with_name(f".{name}.jsonl")
                write_sample(documents, written, self.held_out_characters)
                check_unseen(name, json_lines(written), json_lines(self.train_text))
                written.replace(text)
            self._tokenize(text, prefix)
        self.commands.import_dense(self.model, self.output / "dense")
        for conversion in sorted(conversions, key=lambda each: each.name):
            folder = self.output / conversion.name
            if not folder.is_dir():
                words = ["convert", "import", "--hf", self.model, "--output", folder]
                self.commands.run(*words, *self._swaps(conversion))
        self.dense()

    def dense(self) -> dict[str, float]:
        """Cross entropy of the dense source on each text."""
        return self._cross_entropy(self.output / "dense", self.output / "dense_cross_entropy")

    def run(self, method: Method, tokens: int, seed: int) -> dict[str, Any]:
        """Take a method through all of its stages, or read what it gave.

        Args:
            tokens: that it reads in all, to choose layers and to calibrate included.
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
        checkpoint, before = self.output / method.conversion.name, method.conversion.tokens_read
        curve, seconds = [], 0.0
        for stage, steps in self.steps(method, tokens):
            run, a_step = folder / stage.kind, self.size.sequences * stage.seq_length
            began = time.monotonic()
            read = steps * a_step or CALIBRATION_TOKENS
            self._train(stage, steps, checkpoint, run, seed)
            seconds += time.monotonic() - began
            curve += list(self._curve(run, before if steps else before + read, a_step))
            before += read
            checkpoint = run / "checkpoints"
            if stage.seq_length != SEQ_LENGTH:
                curve.append([before, self._cross_entropy(checkpoint, run / "cross_entropy")])
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

    def steps(self, method: Method, tokens: int) -> Iterator[tuple[Stage, int]]:
        """Steps of each stage; a start reads its tokens without one."""
        starts = sum(stage.share == 0 for stage in method.stages)
        left = tokens - method.conversion.tokens_read - starts * CALIBRATION_TOKENS
        for stage in method.stages:
            wanted = left * stage.share
            if stage.share == 0:
                yield stage, 0
            elif wanted >= 1:
                yield stage, max(1, round(wanted / (self.size.sequences * stage.seq_length)))

    def _train(self, stage: Stage, steps: int, checkpoint: Path, run: Path, seed: int) -> None:
        learns = [] if stage.kind == "cpt" else [f"stage.teacher={self.output / 'dense'}"]
        # Other lengths than those of the table are measured behind the stage, at the table's.
        is_measured = stage.seq_length == SEQ_LENGTH
        valid = ",".join(str(prefix) for prefix in self.valid.values() if is_measured)
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
            f"stage.seq_length={stage.seq_length}",
            f"stage.micro_batch_size={self.size.micro_batch}",
            f"stage.global_batch_size={self.size.sequences}",
            f"optimizer.lr_warmup_iters={min(10, steps // 4)}",
            *stage.settings,
            f"data.train=[{self.output / 'data' / 'train_train'}]",
            f"data.valid=[{valid}]",
            f"logging.eval_interval={max(1, steps // evaluations) if is_measured else 0}",
            f"logging.eval_iters={10**6}",
            "logging.tensorboard=false",
            f"seed={seed}",
            f"output_dir={run}",
        )

    def _cross_entropy(self, model: Path, reports: Path) -> dict[str, float]:
        """Of a checkpoint on each text; what is in the folder of reports is not measured again."""
        reports.mkdir(exist_ok=True)
        found = {}
        for name, prefix in self.valid.items():
            report = reports / f"{name}.json"
            if not report.is_file():
                words = ["evaluate", "--model", model, "--data", prefix, "--output", report]
                self.commands.run(*words, "--seq-length", SEQ_LENGTH)
            found[name] = json.loads(report.read_text())["cross_entropy"]
        return found

    def _curve(self, run: Path, before: int, a_step: int) -> Iterator[list[Any]]:
        for point in read_metrics(run):
            if "valid/cross_entropy" in point:
                prefix = "valid/cross_entropy/"
                of_texts = {
                    key.removeprefix(prefix): value for key, value in point.items() if key.startswith(prefix)
                }
                yield [before + point["iteration"] * a_step, of_texts]

    def _swaps(self, conversion: Conversion) -> list[object]:
        """Words of spikingbrain-convert import."""
        recipe = [f"sliding_window={WINDOW}", f"num_sink_tokens={conversion.sinks}"]
        if conversion.choice is None:
            return ["--conversion", "spikingbrain_7b", f"mixers=[{conversion.mixer},swa]", *recipe]
        choice = self.output / "choice" / conversion.name
        if not (choice / "conversion.yaml").is_file():
            data = self.output / "data"
            words: list[object] = ["choose-layers", "--model", self.model, "--output", choice]
            words += ["--data", data / "train_valid", "--tokens", conversion.choice.tokens]
            words += ["--seq-length", SEQ_LENGTH, "--calibration-data", data / "train_train"]
            words += ["--calibration-tokens", conversion.choice.calibration_tokens]
            self.commands.run(*words, *recipe)
        return ["--conversion", choice / "conversion.yaml"]

    def _tokenize(self, text: Path, prefix: Path, *split: object) -> None:
        done = Path(f"{prefix}_train.idx" if split else f"{prefix}.idx")
        if not done.is_file():
            words = ["preprocess", "--input", text, "--tokenizer", self.model, "--output-prefix", prefix]
            self.commands.run(*words, *split)
