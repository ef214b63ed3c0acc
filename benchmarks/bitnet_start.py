"""Claim: ternary weights that are faded in end lower than ternary weights from the first step on.

At equal tokens, from one dense source: every linear of every layer gets ternary weights and INT8 inputs
(BitNet b1.58), at once or on a straight line over the first part of the training (the warm-up of
"Fine-tuning LLMs to 1.58bit", Hugging Face 2024). Both are measured on held-out text with whole ternary
numbers, each at every learning rate of ``--lr``, so that none is judged by a rate that suits the other.
All of it is commands that users type; it is resumable, and runs in pieces:

  python benchmarks/bitnet_start.py --output outputs/bitnet_start --model models/SmolLM2-135M-Instruct \\
      --train docs_train.jsonl.zst --valid docs_valid.jsonl.zst --tokens 8192 --lr 3e-4 1e-3 --minutes 30

With --report a table of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conversion_quality import tokens as tokens_of  # noqa: E402
from benchmarks.conversion_texts import sample_once  # noqa: E402
from benchmarks.project_commands import (  # noqa: E402
    OutOfTimeError,
    ProjectCommands,
    add_piece_options,
    one_sequence_a_step,
)
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.reporting.tables import table  # noqa: E402
from spikingbrain_train.storage.durable_files import write_text_durably  # noqa: E402

SEQ_LENGTH = 128
_CHARACTERS = {"train": 4_000_000, "valid": 30_000}
_WINDOWS = 32
"""Of held-out text, SEQ_LENGTH tokens each."""
_PROJECTIONS = "[qkv,attention_output,mlp_fc1,mlp_fc2]"


@dataclass(frozen=True)
class Row:
    """One way to begin.

    Attributes:
        name: in tables.
        faded: share of the steps after which weights and inputs are whole quantised numbers.
    """

    name: str
    faded: float


ROWS = (Row("hard switch", 0.0), Row("fade-in", 0.5))


class StartRuns:
    """All rows, each a training and its measurement.

    Args:
        output: folder of everything.
        model: Hugging Face folder of the dense source.
        commands: run until the time is over.
    """

    def __init__(self, output: Path, model: Path, commands: ProjectCommands) -> None:
        self.output, self.model, self.commands = output, model, commands
        self.data = output / "data"

    def prepare(self, train: Path, valid: Path) -> None:
        """Texts, and the dense source as a checkpoint."""
        self.data.mkdir(parents=True, exist_ok=True)
        for name, text in (("train", train), ("valid", valid)):
            sample_once(text, self.data / f"{name}.jsonl", _CHARACTERS[name])
        self.commands.tokenize(self.data, ("train", "valid"), self.model)
        self.commands.import_dense(self.model, self.output / "dense")

    def dense_cross_entropy(self) -> float:
        """Of the source, which was trained on none of this, in nats."""
        return self._cross_entropy(self.output / "dense", self.output / "dense.json")

    def run(self, row: Row, tokens: int, learning_rate: float) -> dict[str, Any]:
        """Train and measure a row, or read what that gave.

        Returns:
            ``cross_entropy`` in nats of the held-out text.

        Raises:
            OutOfTimeError: go on with another call.
        """
        folder = self.output / "runs" / f"{row.name.replace(' ', '-')}-{tokens}-{learning_rate:g}"
        result = folder / "result.json"
        if not result.is_file():
            steps = tokens // SEQ_LENGTH
            self._train(folder / "train", steps, round(row.faded * steps), learning_rate)
            entropy = self._cross_entropy(folder / "train", folder / "evaluation.json")
            done = {"row": row.name, "tokens": tokens, "lr": learning_rate, "cross_entropy": entropy}
            write_text_durably(result, json.dumps(done) + "\n")
        return json.loads(result.read_text())

    def _train(self, folder: Path, steps: int, anneal_iters: int, rate: float) -> None:
        """A stage of one sequence a step; nothing is done again that is done."""
        self.commands.run(
            "train",
            "stage=cpt",
            *one_sequence_a_step(steps, SEQ_LENGTH, rate, steps // 8, self.data / "train"),
            "precision=fp32",
            f"model.ternary.projections={_PROJECTIONS}",
            f"model.int8_inputs.projections={_PROJECTIONS}",
            f"stage.quantization_annealing.anneal_iters={anneal_iters}",
            f"checkpoint.load={self.output / 'dense'}",
            f"output_dir={folder}",
        )

    def _cross_entropy(self, model: Path, output: Path) -> float:
        if not output.is_file():
            words = ("evaluate", "--model", model, "--data", self.data / "valid", "--output", output)
            self.commands.run(*words, "--seq-length", SEQ_LENGTH, "--max-windows", _WINDOWS)
        return json.loads(output.read_text())["cross_entropy"]


def report(results: Sequence[dict[str, Any]], dense: float | None) -> list[str]:
    """The table: rates in columns, ways to begin in rows."""
    tokens = sorted({each["tokens"] for each in results})
    rates = sorted({each["lr"] for each in results})
    rows = [["tokens", "start", *(f"lr {rate:g}" for rate in rates)]]
    for number in tokens:
        for row in ROWS:
            found = {
                each["lr"]: f"{each['cross_entropy']:.3f}"
                for each in results
                if each["tokens"] == number and each["row"] == row.name
            }
            if found:
                rows.append([str(number), row.name, *(found.get(rate, "-") for rate in rates)])
    lines = table(rows, left=2)
    return lines if dense is None else [*lines, f"The dense source, not trained: {dense:.3f}"]


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder of all runs")
    flags.add_argument("--train", type=Path, required=True, help="text to train on, JSON lines")
    flags.add_argument("--valid", type=Path, required=True, help="held-out text of the same kind")
    flags.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the dense source")
    flags.add_argument("--tokens", type=tokens_of, default=8192, help="that every row is trained on")
    flags.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3], help="rates, each for every row")
    add_piece_options(flags)
    return flags


def main() -> None:
    """Run what is missing, then show what is there."""
    flags = parser().parse_args()
    runs = StartRuns(flags.output, flags.model, ProjectCommands.within(flags.minutes))
    with user_errors():
        if not flags.report:
            try:
                runs.prepare(flags.train, flags.valid)
                runs.dense_cross_entropy()
                for rate in flags.lr:
                    for row in ROWS:
                        runs.run(row, flags.tokens, rate)
            except OutOfTimeError as stop:
                print(stop)
        results = [json.loads(path.read_text()) for path in sorted(flags.output.glob("runs/*/result.json"))]
        dense = flags.output / "dense.json"
        entropy = json.loads(dense.read_text())["cross_entropy"] if dense.is_file() else None
        print("\n".join(report(results, entropy)))


if __name__ == "__main__":
    main()
