"""Claim: the report's ablations hold in small (SpikingBrain, arXiv 2509.05276, tables 12 and 13).

What each element costs, at equal tokens: full attention, windows, linear attention and their hybrid (table
12, with single-needle recall within the window and beyond it, and how likely the answer is), then hybrid (H),
experts (M) and spikes (S) in all combinations (table 13). Lengths are an eighth of the published ones:
windows of 512 and 16 tokens, sequences of 1024, needles at 512 and 1024. Every variant is swapped into the
same dense source and trained with next-token loss. Where attention was swapped a sink token stands in front,
and linear attention begins with its closed-form start, whose tokens count (docs/recipe.md). All of it is
commands that users type; it is resumable, and runs in pieces:

  python benchmarks/ablations.py --output outputs/ablations --model models/SmolLM2-135M-Instruct \\
      --train docs_train.jsonl.zst --valid docs_valid.jsonl.zst --seeds 1 2 3 --minutes 60

With --report tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conversion_methods import CALIBRATION_TOKENS, START_ON_STUDENT  # noqa: E402
from benchmarks.conversion_quality import tokens as tokens_of  # noqa: E402
from benchmarks.conversion_texts import sample_once  # noqa: E402
from benchmarks.project_commands import (  # noqa: E402
    OutOfTimeError,
    ProjectCommands,
    add_piece_options,
)
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.reporting.tables import table  # noqa: E402
from spikingbrain_train.storage.durable_files import write_text_durably  # noqa: E402

SEQ_LENGTH, WINDOW, SHORT_WINDOW = 1024, 512, 16
NEEDLES = ("512", "1024")
_NEEDLES_OF_A_DEPTH = 1
_HELD_OUT_CHARACTERS, _TRAIN_CHARACTERS = 100_000, 20_000_000
_SINK = "num_sink_tokens=1"
_HYBRID = ("mixers=[gla,swa]", f"sliding_window={WINDOW}", _SINK)
_EXPERTS = ("feed_forwards=[moe]", "moe.num_experts=4", "moe.router_topk=1", "moe.num_shared_experts=1")
_SPIKES = ("spiking.projections=[qkv,attention_output,mlp_fc1,mlp_fc2]",)


@dataclass(frozen=True)
class Variant:
    """What is swapped into the dense source.

    Attributes:
        name: in tables; H, M and S as in table 13.
        recipe: of spikingbrain-convert import, in its words.
        published: HellaSwag, MMLU and, in table 12, recall at 4k (a window) and 8k; percent, None where
            the report gives none.
    """

    name: str
    recipe: tuple[str, ...]
    published: tuple[float | None, ...]


MIXERS = (
    Variant("full", ("mixers=[full]",), (60.21, 61.78, 100.0, 98.41)),
    Variant("window", ("mixers=[swa]", f"sliding_window={WINDOW}", _SINK), (60.12, 61.74, 100.0, 47.60)),
    Variant("H", _HYBRID, (57.88, 56.08, 96.83, 44.44)),
    Variant("linear", ("mixers=[gla]", _SINK), (54.72, 39.87, 36.16, 39.40)),
    Variant(
        "short window", ("mixers=[swa]", f"sliding_window={SHORT_WINDOW}", _SINK), (None, None, 1.87, 0.0)
    ),
)
ELEMENTS = (
    Variant("full", ("mixers=[full]",), (60.21, 61.78)),
    Variant("M", ("mixers=[full]", *_EXPERTS), (60.25, 61.88)),
    Variant("S", ("mixers=[full]", *_SPIKES), (59.63, 61.17)),
    Variant("M+S", ("mixers=[full]", *_EXPERTS, *_SPIKES), (59.66, 59.22)),
    Variant("H", _HYBRID, (57.88, 56.08)),
    Variant("H+M", (*_HYBRID, *_EXPERTS), (57.93, 56.05)),
    Variant("H+S", (*_HYBRID, *_SPIKES), (57.37, 54.87)),
    Variant("H+M+S", (*_HYBRID, *_EXPERTS, *_SPIKES), (57.77, 55.02)),
)
VARIANTS = {variant.name: variant for variant in (*MIXERS, *ELEMENTS)}
_PROBED = {variant.name for variant in MIXERS}


class Ablations:
    """All runs, each a chain of commands.

    Args:
        output: folder of everything.
        model: Hugging Face folder of the dense source.
        commands: run until the time is over.
    """

    def __init__(self, output: Path, model: Path, commands: ProjectCommands) -> None:
        self.output = output
        self.model = model
        self.commands = commands
        self.data = output / "data"

    def prepare(self, train: Path, valid: Path) -> None:
        """Texts, and the dense source as a checkpoint.

        Args:
            train: text to train on, JSON lines.
            valid: held-out text of the same kinds.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        for name, text, characters in (
            ("train", train, _TRAIN_CHARACTERS),
            ("valid", valid, _HELD_OUT_CHARACTERS),
        ):
            sample_once(text, self.data / f"{name}.jsonl", characters)
        self.commands.tokenize(self.data, ("train", "valid"), self.model)
        self.commands.import_dense(self.model, self.output / "dense")

    def run(self, variant: Variant, tokens: int, learning_rate: float, seed: int) -> dict[str, Any]:
        """Swap a variant into the source and train it on, or read what that gave.

        Args:
            variant: what is swapped.
            tokens: that it is trained on, those of a closed-form start included.
            learning_rate: of that.
            seed: of the order of the text, and of new weights.

        Returns:
            ``cross_entropy`` in nats of the held-out text, and for each length, empty outside table 12,
            ``recall``, the share of needles that generated text contains (as RULER counts), and
            ``answer_nats``, what a token of the answer costs.

        Raises:
            OutOfTimeError: go on with another call.
        """
        folder = self.output / "runs" / f"{variant.name.replace(' ', '-')}-{tokens}-{seed}"
        result = folder / "result.json"
        if result.is_file():
            return json.loads(result.read_text())
        checkpoint = folder / "converted"
        if not checkpoint.is_dir():
            words = ("convert", "import", "--hf", self.model, "--output", checkpoint)
            self.commands.run(*words, "--conversion", "dense", *variant.recipe, f"seed={seed}")
        left = tokens
        if any("gla" in word for word in variant.recipe):
            start = (*START_ON_STUDENT.settings, f"stage.teacher={self.output / 'dense'}")
            self._train("align", start, checkpoint, folder / "start", 0, seed)
            checkpoint, left = folder / "start" / "checkpoints", tokens - CALIBRATION_TOKENS
        rates = (f"optimizer.lr={learning_rate}", f"optimizer.min_lr={learning_rate / 10}")
        self._train("cpt", rates, checkpoint, folder / "cpt", left // SEQ_LENGTH, seed)
        measured = folder / "evaluation.json"
        if not measured.is_file():
            words = ["evaluate", "--model", folder / "cpt", "--data", self.data / "valid"]
            words += ["--seq-length", SEQ_LENGTH, "--output", measured]
            if variant.name in _PROBED:
                words += ["--probes", "needle", "--probe-lengths", ",".join(NEEDLES)]
                words += ["--probe-samples", _NEEDLES_OF_A_DEPTH, "--probe-scoring", "both"]
            self.commands.run(*words)
        found = json.loads(measured.read_text())
        needles = found["probes"]["results"]["needle"] if variant.name in _PROBED else {}
        done = {
            "variant": variant.name,
            "tokens": tokens,
            "seed": seed,
            "cross_entropy": found["cross_entropy"],
            "recall": {length: needle["generated_accuracy"] for length, needle in needles.items()},
            "answer_nats": {length: needle["nats_per_token"] for length, needle in needles.items()},
        }
        write_text_durably(result, json.dumps(done) + "\n")
        for weights in (folder / "converted", folder / "start", folder / "cpt"):
            shutil.rmtree(weights, ignore_errors=True)
        return done

    def _train(
        self, kind: str, settings: Sequence[str], checkpoint: Path, run: Path, steps: int, seed: int
    ) -> None:
        """A stage of one sequence a step; nothing is done again that is done."""
        self.commands.run(
            "train",
            f"stage={kind}",
            f"checkpoint.load={checkpoint}",
            "checkpoint.keep_last=1",
            f"checkpoint.save_interval={max(1, steps)}",
            f"stage.train_iters={steps}",
            f"stage.seq_length={SEQ_LENGTH}",
            "stage.micro_batch_size=1",
            "stage.global_batch_size=1",
            f"optimizer.lr_warmup_iters={min(10, steps // 4)}",
            "optimizer.weight_decay=0",
            *settings,
            f"data.train=[{self.data / 'train'}]",
            "logging.tensorboard=false",
            f"seed={seed}",
            f"output_dir={run}",
        )


@dataclass(frozen=True)
class _Column:
    """What was measured of every variant of a table.

    Attributes:
        name: in tables.
        key: of a result.
        length: of its needles; None where it has none.
        published: the columns of ``Variant.published`` whose order it is held to.
        is_loss: whether less is better.
    """

    name: str
    key: str
    length: str | None
    published: tuple[int, ...]
    is_loss: bool

    def values(self, runs: Sequence[dict[str, Any]]) -> list[float]:
        """Of the runs in which it was measured."""
        if self.length is None:
            return [run[self.key] for run in runs]
        return [run[self.key][self.length] for run in runs if run.get(self.key)]


_CROSS_ENTROPY = _Column("cross entropy", "cross_entropy", None, (0, 1), is_loss=True)
_RECALL = [_Column(f"recall at {name}", "recall", name, (2 + at,), False) for at, name in enumerate(NEEDLES)]
_ANSWERS = [
    _Column(f"nats at {name}", "answer_nats", name, (2 + at,), is_loss=True)
    for at, name in enumerate(NEEDLES)
]
_PUBLISHED = ("HellaSwag", "MMLU", "recall at 4k", "recall at 8k")
_TIE = 0.5
"""Points; the report's pairs that are closer are no order."""


def report(results: Sequence[dict[str, Any]]) -> list[str]:
    """Both tables, and how many of the published orders hold."""
    seeds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        seeds.setdefault(result["variant"], []).append(result)
    tables = (
        ("table 12", MIXERS, [_CROSS_ENTROPY, *_RECALL, *_ANSWERS]),
        ("table 13", ELEMENTS, [_CROSS_ENTROPY]),
    )
    lines: list[str] = []
    for title, variants, columns in tables:
        shown = [variant for variant in variants if variant.name in seeds]
        rows = [[title, *(column.name for column in columns), "published", "seeds"]]
        for variant in shown:
            runs = seeds[variant.name]
            published = " / ".join("-" if value is None else f"{value:g}" for value in variant.published)
            rows.append(
                [variant.name, *(_spread(each.values(runs)) for each in columns), published, str(len(runs))]
            )
        lines += [*table(rows, left=1), ""]
        for column in columns:
            ours = {variant.name: column.values(seeds[variant.name]) for variant in shown}
            lines += [_orders(shown, ours, column, number) for number in column.published]
        lines.append("")
    return lines


def _orders(shown: Sequence[Variant], ours: dict[str, list[float]], column: _Column, published: int) -> str:
    """A sentence: of how many pairs that the report orders the order is the same here."""
    known = [each for each in shown if each.published[published] is not None and ours[each.name]]
    ordered, other = 0, []
    for one, two in combinations(known, 2):
        above = (one.published[published] or 0.0) - (two.published[published] or 0.0)
        if abs(above) < _TIE:
            continue
        better, worse = (one, two) if above > 0 else (two, one)
        gain = mean(ours[better.name]) - mean(ours[worse.name])
        ordered += 1
        if (gain >= 0) if column.is_loss else (gain <= 0):
            other.append(f"{better.name} over {worse.name}")
    holds = (
        f"{column.name}: {ordered - len(other)} of {ordered} pairs as published by {_PUBLISHED[published]}"
    )
    return f"{holds}; not: {', '.join(other)}" if other else holds


def _spread(values: Sequence[float]) -> str:
    """Mean of the seeds, and their standard deviation where there are several."""
    if not values:
        return "-"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder of all runs")
    flags.add_argument("--train", type=Path, required=True, help="text to train on, JSON lines")
    flags.add_argument("--valid", type=Path, required=True, help="held-out text of the same kinds")
    flags.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the dense source")
    flags.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    flags.add_argument("--tokens", type=tokens_of, default=65_536, help="that every variant is trained on")
    flags.add_argument("--lr", type=float, default=1e-4, help="learning rate of that")
    flags.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add_piece_options(flags)
    return flags


def main() -> None:
    """Run what is missing, then show what is there."""
    flags = parser().parse_args()
    ablations = Ablations(flags.output, flags.model, ProjectCommands.within(flags.minutes))
    with user_errors():
        if not flags.report:
            try:
                ablations.prepare(flags.train, flags.valid)
                for seed in flags.seeds:
                    for name in flags.variants:
                        ablations.run(VARIANTS[name], flags.tokens, flags.lr, seed)
            except OutOfTimeError as stop:
                print(stop)
        results = [json.loads(path.read_text()) for path in sorted(flags.output.glob("runs/*/result.json"))]
        print("\n".join(report(results)))
        write_text_durably(flags.output / "ablations.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
