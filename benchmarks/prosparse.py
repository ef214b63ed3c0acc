"""Claim: ProSparse's steps make feed-forwards sparse at little cost (arXiv 2402.13516, table 1).

At equal tokens, from one dense source with SwiGLUs: a control that keeps them, ReLU alone, ReLU with the
staged L1 loss, and a threshold (FATReLU) fitted to that on text of its own. Of each the share of zeros and
the held-out cross entropy. ``--distill`` adds ReLU, L1 and threshold once more: projections fitted in closed
form to the dense source (docs/prosparse.md), whose tokens count, then learning from its logits instead of
from the next token. All of it is commands that users type; it is resumable, and runs in pieces:

  python benchmarks/prosparse.py --output outputs/prosparse --model models/SmolLM2-135M-Instruct \\
      --train docs_train.jsonl.zst --valid docs_valid.jsonl.zst --tokens 24k --distill --minutes 60

With --report a table of what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
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

SEQ_LENGTH = 256
_HELD_OUT_CHARACTERS, _TRAIN_CHARACTERS = 60_000, 4_000_000
_WINDOWS = {"fit": 4, "measure": 16}
"""Of text to fit a threshold on, which is read some ten times, and of text to measure on."""
_LOSS_BUDGET = 0.01
_FIT_TOKENS, _FIT_RIDGE = 8192, 0.3
"""Of the closed form: what it reads, and its pull towards the source's projections."""
_RELU = ("activation_func=relu",)


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        name: in tables.
        recipe: of spikingbrain-convert import, in its words.
        kind: of the stage; ``distill`` begins with the fit in closed form.
        rate: how many times ``--lr`` its learning rate is: weights that have to move far get more.
        has_l1: whether it has the staged loss, and so is given a threshold afterwards.
    """

    name: str
    recipe: tuple[str, ...]
    kind: str
    rate: float
    has_l1: bool


ROWS = (
    Row("control", (), "cpt", 1, False),
    Row("relu", _RELU, "cpt", 3, False),
    Row("relu-l1", _RELU, "cpt", 3, True),
)
DISTILLED = (
    Row("distill-relu", _RELU, "distill", 1, False),
    Row("distill-relu-l1", _RELU, "distill", 1, True),
)


class ProSparseRuns:
    """All rows, each a chain of commands.

    Args:
        output: folder of everything.
        model: Hugging Face folder of the dense source.
        commands: run until the time is over.
        l1_factor: the largest factor of the L1 loss.
    """

    def __init__(self, output: Path, model: Path, commands: ProjectCommands, l1_factor: float) -> None:
        self.output, self.model, self.commands, self.l1_factor = output, model, commands, l1_factor
        self.data = output / "data"

    def prepare(self, train: Path, valid: Path) -> None:
        """Texts to train on, to fit thresholds on and to measure on, and the dense source as a checkpoint."""
        self.data.mkdir(parents=True, exist_ok=True)
        for name, text, characters in (
            ("train", train, _TRAIN_CHARACTERS),
            ("valid", valid, _HELD_OUT_CHARACTERS),
        ):
            sample_once(text, self.data / f"{name}.jsonl", characters)
        fit = self.data / "fit.jsonl"
        if not fit.is_file():  # two halves of one sample: no document is in both
            lines = (self.data / "valid.jsonl").read_text().splitlines(keepends=True)
            write_text_durably(fit, "".join(lines[: len(lines) // 2]))
            write_text_durably(self.data / "measure.jsonl", "".join(lines[len(lines) // 2 :]))
        self.commands.tokenize(self.data, ("train", "fit", "measure"), self.model)
        self.commands.import_dense(self.model, self.output / "dense")

    def run(self, row: Row, tokens: int, learning_rate: float) -> dict[str, Any]:
        """Train and measure a row, or read what that gave.

        Returns:
            ``cross_entropy`` in nats of the held-out text, ``sparsity``, and for a row with L1 the
            same ``shifted`` by the ``threshold`` that was fitted.

        Raises:
            OutOfTimeError: go on with another call.
        """
        folder = self.output / "runs" / f"{row.name}-{tokens}"
        result = folder / "result.json"
        if result.is_file():
            return json.loads(result.read_text())
        if not (folder / "converted").is_dir():
            words = ("convert", "import", "--hf", self.model, "--output", folder / "converted")
            self.commands.run(*words, "--conversion", "dense", *row.recipe)
        start, left = folder / "converted", tokens
        if row.kind == "distill":
            self._fit(folder)
            start, left = folder / "start" / "checkpoints", tokens - _FIT_TOKENS
        self._train(row, folder, start, left // SEQ_LENGTH, learning_rate * row.rate)
        done: dict[str, Any] = {"row": row.name, "tokens": tokens}
        if row.recipe:
            thresholds: tuple[object, ...] = (0,)
            if row.has_l1:
                flags = ("--fit-threshold", "--loss-budget", _LOSS_BUDGET)
                done["threshold"] = self._analysis(folder, "fit", flags)["fit"]["threshold"]
                thresholds = (0, done["threshold"])
            curve = self._analysis(folder, "measure", ("--thresholds", *thresholds))["thresholds"]
            done |= {name: curve[0][name] for name in ("cross_entropy", "sparsity")}
            if row.has_l1:
                done["shifted"] = {name: curve[-1][name] for name in ("cross_entropy", "sparsity")}
        else:
            measured = folder / "evaluation.json"
            words = ("evaluate", "--model", folder / "train", "--data", self.data / "measure")
            windows = ("--seq-length", SEQ_LENGTH, "--max-windows", _WINDOWS["measure"])
            self.commands.run(*words, *windows, "--output", measured)
            done |= {"cross_entropy": json.loads(measured.read_text())["cross_entropy"], "sparsity": 0.0}
        write_text_durably(result, json.dumps(done) + "\n")
        for weights in (folder / "converted", folder / "start"):
            shutil.rmtree(weights, ignore_errors=True)
        return done

    def _fit(self, folder: Path) -> None:
        """Fit projections to what the dense source's layers give; no step is taken."""
        self.commands.run(
            "train",
            "stage=align",
            "cluster=cpu",
            f"stage.teacher={self.output / 'dense'}",
            f"checkpoint.load={folder / 'converted'}",
            "stage.train_iters=0",
            "stage.seq_length=512",
            "stage.micro_batch_size=1",
            "stage.global_batch_size=1",
            f"stage.alignment.calibration_tokens={_FIT_TOKENS}",
            "stage.alignment.calibration_inputs=student",
            "stage.alignment.fit_source_projections=true",
            f"stage.alignment.source_projection_ridge={_FIT_RIDGE}",
            f"data.train=[{self.data / 'train'}]",
            "logging.tensorboard=false",
            f"output_dir={folder / 'start'}",
        )

    def _train(self, row: Row, folder: Path, start: Path, steps: int, rate: float) -> None:
        """A stage of one sequence a step; nothing is done again that is done."""
        teacher = [f"stage.teacher={self.output / 'dense'}"] if row.kind == "distill" else []
        loss = []
        if row.has_l1:
            # None while ReLU settles, then two rises, and the last quarter at the full factor.
            factors = [0.0, self.l1_factor / 4, self.l1_factor, self.l1_factor]
            ends = [steps // 8, steps * 3 // 8, steps * 3 // 4, steps]
            loss = [f"stage.sparsity.l1_factors={factors}", f"stage.sparsity.l1_end_steps={ends}"]
        self.commands.run(
            "train",
            f"stage={row.kind}",
            *one_sequence_a_step(steps, SEQ_LENGTH, rate, min(4, steps // 4), self.data / "train"),
            *teacher,
            *loss,
            f"checkpoint.load={start}",
            f"output_dir={folder / 'train'}",
        )

    def _analysis(self, folder: Path, text: str, flags: Sequence[object]) -> dict[str, Any]:
        output = folder / text
        if not (output / "sparsity.json").is_file():
            words = ("analyze-sparsity", "--model", folder / "train", "--data", self.data / text)
            windows = ("--seq-length", SEQ_LENGTH, "--windows", _WINDOWS[text])
            self.commands.run(*words, *windows, "--dtype", "float32", "--output", output, *flags)
        return json.loads((output / "sparsity.json").read_text())


def report(results: Sequence[dict[str, Any]]) -> list[str]:
    """The table."""
    found = {each["row"]: each for each in results}
    control = found.get("control", {}).get("cross_entropy")
    rows = [["row", "tokens", "sparsity", "cross entropy", "above control", "threshold"]]
    for name in [row.name for row in (*ROWS, *DISTILLED)]:
        if name not in found:
            continue
        each = found[name]
        measured = [(name, each, "-")]
        if "shifted" in each:
            measured.append((f"{name}, shifted", each["shifted"], f"{each['threshold']:g}"))
        for label, numbers, threshold in measured:
            above = "-" if control is None else f"{numbers['cross_entropy'] - control:+.3f}"
            sparsity, entropy = f"{numbers['sparsity']:.1%}", f"{numbers['cross_entropy']:.3f}"
            rows.append([label, str(each["tokens"]), sparsity, entropy, above, threshold])
    return table(rows, left=1)


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder of all runs")
    flags.add_argument("--train", type=Path, required=True, help="text to train on, JSON lines")
    flags.add_argument("--valid", type=Path, required=True, help="held-out text of the same kinds")
    flags.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the dense source")
    flags.add_argument("--tokens", type=tokens_of, default=8192, help="that every row is trained on")
    flags.add_argument(
        "--lr", type=float, default=1e-4, help="three times that where ReLU learns without a fit"
    )
    flags.add_argument("--l1-factor", type=float, default=2.0, help="the largest of the L1 loss")
    flags.add_argument("--distill", action="store_true", help="also learn from the dense source")
    add_piece_options(flags)
    return flags


def main() -> None:
    """Run what is missing, then show what is there."""
    flags = parser().parse_args()
    runs = ProSparseRuns(flags.output, flags.model, ProjectCommands.within(flags.minutes), flags.l1_factor)
    with user_errors():
        if not flags.report:
            try:
                runs.prepare(flags.train, flags.valid)
                for row in (*ROWS, *(DISTILLED if flags.distill else ())):
                    runs.run(row, flags.tokens, flags.lr)
            except OutOfTimeError as stop:
                print(stop)
        results = [json.loads(path.read_text()) for path in sorted(flags.output.glob("runs/*/result.json"))]
        print("\n".join(report(results)))


if __name__ == "__main__":
    main()
