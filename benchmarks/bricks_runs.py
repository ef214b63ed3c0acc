"""The pieces of benchmarks/bricks.py: each a chain of commands that users type, resumable.

What is done lies in the output folder and is not done again; a stopped training goes on from its checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bricks_texts import ABILITIES, write_ability
from benchmarks.conversion_texts import sample_once
from benchmarks.project_commands import ProjectCommands, one_sequence_a_step
from spikingbrain_train.storage.durable_files import write_text_durably

SEQ_LENGTH = 512
_HELD_OUT_CHARACTERS, _ABILITY_TRAIN_CHARACTERS, _TRAIN_CHARACTERS = 40_000, 120_000, 400_000
_FIT_CHARACTERS, _KIND_CHARACTERS = 6_000, 5_000
"""At least, of the documents that routers are fitted on, and of each kind that adapters are measured on."""
EXPERTS, TOPK = 48, 14
"""29 % of the neurons."""
_ROUTER_HIDDEN = 128
MASKED = (0, 30, 50, 60, 70, 75, 80, 90)
ADAPTED = ("german", "maths")
"""Kinds of text that an adapter is trained on, each its own."""
BESIDE = ("code", "essays")
"""Kinds that no adapter is trained on."""


@dataclass(frozen=True)
class Cut:
    """A dense model cut into experts."""

    name: str
    partition: str
    router: str


CUTS = (
    Cut("clusters, mlp", "clusters", "mlp"),
    Cut("clusters, centres", "clusters", "centres"),
    Cut("random, fitted", "random", "fitted"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is read and trained.

    Attributes:
        windows: of 512 tokens, for a number.
        ability_windows: of 128 tokens of each ability, half to score neurons on and half to read.
        predictor_windows: of 512 tokens, that predictors learn from.
        steps: of one window, of every training.
    """

    windows: int = 4
    ability_windows: int = 24
    predictor_windows: int = 12
    steps: int = 24


class BrickRuns:
    """All pieces.

    Args:
        output: folder of everything.
        model: Hugging Face folder of the dense source.
        relu: checkpoint of a model whose feed-forwards have zeros, for predictors; None leaves them out.
        commands: run until the time is over.
        sizes: of what is read.
        dtype: that models are read in.
    """

    def __init__(
        self,
        output: Path,
        model: Path,
        relu: Path | None,
        commands: ProjectCommands,
        sizes: Sizes,
        dtype: str,
    ) -> None:
        self.output, self.model, self.relu, self.commands = output, model, relu, commands
        self.sizes, self.dtype = sizes, dtype
        self.data, self.dense = output / "data", output / "dense"

    def prepare(self, train: Path, valid: Path) -> None:
        """Texts, tokens, and the dense source as a checkpoint."""
        self.data.mkdir(parents=True, exist_ok=True)
        for name, text, characters in (
            ("docs_train", train, _TRAIN_CHARACTERS),
            ("docs", valid, _HELD_OUT_CHARACTERS),
        ):
            sample_once(text, self.data / f"{name}.jsonl", characters)
        fit = self.data / "docs_fit.jsonl"
        if not fit.is_file():  # documents of the training text that nothing is trained on
            lines = (self.data / "docs_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            write_text_durably(fit, "".join(_first(lines, _FIT_CHARACTERS)))
            rest = lines[len(_first(lines, _FIT_CHARACTERS)) :]
            write_text_durably(self.data / "docs_train.jsonl", "".join(rest))
        for name in ABILITIES:
            write_ability(name, self.data, _HELD_OUT_CHARACTERS, _ABILITY_TRAIN_CHARACTERS)
        trained = [f"{name}_train" for name in ADAPTED]
        for name in (*ADAPTED, *BESIDE):
            lines = (self.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            write_text_durably(self.data / f"{name}_kind.jsonl", "".join(_first(lines, _KIND_CHARACTERS)))
        kinds = [f"{name}_kind" for name in (*ADAPTED, *BESIDE)]
        self.commands.tokenize(self.data, ("docs", "docs_fit", "docs_train", *kinds, *trained), self.model)
        self.commands.import_dense(self.model, self.dense)

    def neurons(self) -> None:
        """Cross entropy without the weakest neurons of every token."""
        folder = self.output / "neurons"
        if not (folder / "neurons.json").is_file():
            words = ("--model", self.model, "--text", self.data / "docs.jsonl", *self._reading())
            windows = ("--windows", self.sizes.windows, "--seq-length", SEQ_LENGTH)
            self.commands.run("bricks", "neurons", *words, *windows, "--mask", *MASKED, "--output", folder)

    def abilities(self) -> None:
        """Every kind of text without the neurons of each."""
        folder = self.output / "abilities"
        if not (folder / "abilities.json").is_file():
            texts = [f"{name}={self.data / name}.jsonl" for name in ABILITIES]
            words = ("--model", self.model, "--texts", *texts, *self._reading(), "--prune", 3)
            windows = ("--windows", self.sizes.ability_windows, "--seq-length", 128)
            self.commands.run("bricks", "abilities", *words, *windows, "--output", folder)

    def moefication(self) -> None:
        """Feed-forwards as experts: the function of all, and what 14 of 48 cost before and after steps.

        The control is the dense source after as many steps.
        """
        folder = self.output / "moefication"
        self._once(folder / "whole", self._all_experts)
        self._once(folder / "control", lambda work: self._trained_and_measured(work, self.dense))
        for cut in CUTS:
            self._once(folder / cut.name.replace(", ", "-"), lambda work, cut=cut: self._cut(work, cut))

    def predictors(self) -> None:
        """Which neurons of a model with ReLU will be active."""
        folder = self.output / "predictors"
        if self.relu is None:
            print("predictors need a model with zeros: --relu names one (benchmarks/prosparse.py makes some)")
        elif not (folder / "predictors.json").is_file():
            held_out = self.sizes.windows // 2
            text = ("--text", self.data / "docs_train.jsonl", self.data / "docs.jsonl")
            windows = ("--windows", self.sizes.predictor_windows + held_out, "--held-out", held_out)
            words = ("--model", self.relu, *text, *windows, "--seq-length", SEQ_LENGTH, "--epochs", 8)
            self.commands.run("bricks", "predictors", *words, *self._reading(), "--output", folder)

    def adapters(self) -> None:
        """An adapter for each of two kinds of text, merged, and both composed to one."""
        folder = self.output / "adapters"
        self._once(folder / "base", lambda work: self._kinds(self.dense))
        for name in ADAPTED:
            self._once(folder / name, lambda work, name=name: self._adapter(work, name))
        self._once(folder / "composed", lambda work: self._composed(folder, work))

    def _once(self, folder: Path, work: Callable[[Path], dict[str, Any]]) -> None:
        """What ``work`` gives, in ``result.json``, unless that is there."""
        if not (folder / "result.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text_durably(folder / "result.json", json.dumps(work(folder)) + "\n")

    def _reading(self) -> tuple[object, ...]:
        return ("--dtype", self.dtype)

    def _all_experts(self, work: Path) -> dict[str, Any]:
        """With all experts, float32, one window: what rounding leaves between the two functions."""
        self._moefy(work / "moe", CUTS[-1], topk=EXPERTS)
        exact = ("--dtype", "float32")
        found = {
            name: self._cross_entropy(checkpoint, ["docs"], 1, exact)["docs"]
            for name, checkpoint in (("dense", self.dense), ("moe", work / "moe"))
        }
        shutil.rmtree(work / "moe")
        return found

    def _moefy(self, output: Path, cut: Cut, topk: int = TOPK) -> None:
        """Routers are fitted on windows of the training text and measured on as many of the held-out text."""
        if output.is_dir():
            return
        windows = 2 * self._fit_windows()
        words = ("--model", self.dense, "--data", self.data / "docs_fit", self.data / "docs")
        hidden = ("--router-hidden-size", _ROUTER_HIDDEN) if cut.router == "mlp" else ()
        self.commands.run(
            *("bricks", "moefy", *words, "--windows", windows, "--seq-length", SEQ_LENGTH),
            *("--experts", EXPERTS, "--topk", topk, "--partition", cut.partition),
            *("--router", cut.router, *hidden, *self._reading(), "--output", output),
            *(("--measure",) if cut is not CUTS[0] else ()),  # nothing; the first cut measures all routers
        )

    def _fit_windows(self) -> int:
        """All that routers are fitted on; as many are measured on."""
        return (json.loads((self.data / "docs_fit.json").read_text())["tokens"] - 1) // SEQ_LENGTH

    def _cut(self, work: Path, cut: Cut) -> dict[str, Any]:
        self._moefy(work / "moe", cut)
        rows = json.loads((work / "moe" / "moefy.json").read_text())["rows"]
        done = {"rows": rows, **self._trained_and_measured(work, work / "moe")}
        shutil.rmtree(work / "moe")
        return done

    def _trained_and_measured(self, work: Path, checkpoint: Path) -> dict[str, Any]:
        """Cross entropy of held-out documents before and after steps on others."""
        before = work / "before.json"
        if not before.is_file():
            write_text_durably(before, json.dumps(self._of_docs(checkpoint)))
        self.commands.run(
            *("train", "stage=cpt", "model=from_checkpoint", f"checkpoint.load={_checkpoints(checkpoint)}"),
            *self._steps("docs_train", 1e-4),
            f"output_dir={work / 'train'}",
        )
        after = self._of_docs(work / "train")
        shutil.rmtree(work / "train" / "checkpoints")
        steps = self.sizes.steps
        return {"before": json.loads(before.read_text()), "after": after, "tokens": steps * SEQ_LENGTH}

    def _steps(self, data: str, rate: float) -> tuple[str, ...]:
        """Settings of a training, of one window a step."""
        steps = self.sizes.steps
        return one_sequence_a_step(steps, SEQ_LENGTH, rate, min(4, steps // 4), self.data / data)

    def _adapter(self, work: Path, name: str) -> dict[str, Any]:
        """Train it, measure it, merge it and measure that; its folder of peft stays."""
        self.commands.run(
            *("bricks", "train", "--checkpoint", self.dense, "--adapter", name),
            *("--rank", 16, "--alpha", 32, "--output", work / "train"),
            *("stage=cpt", *self._steps(f"{name}_train", 1e-3)),
        )
        done: dict[str, Any] = {
            "beside": self._kinds(work / "train"),
            "tokens": self.sizes.steps * SEQ_LENGTH,
        }
        words = ("--checkpoint", work / "train")
        if not (work / "merged").is_dir():
            self.commands.run("bricks", "merge", *words, "--output", work / "merged")
        done["merged"] = self._kinds(work / "merged")
        if not (work / "peft").is_dir():
            self.commands.run("bricks", "detach", *words, "--name", name, "--output", work / "peft")
        shutil.rmtree(work / "merged")
        shutil.rmtree(work / "train" / "checkpoints")
        return done

    def _composed(self, folder: Path, work: Path) -> dict[str, Any]:
        """Half of each, and all of both: as one adapter, and all of both once more as two."""
        adapters = [folder / name / "peft" for name in ADAPTED]
        done = {}
        for label, weight in (("half of each", 0.5), ("all of both", 1.0)):
            one, attached = work / f"peft-{weight:g}", work / f"attached-{weight:g}"
            if not one.is_dir():
                words = ("--adapters", *adapters, "--weights", *(weight for _ in adapters))
                self.commands.run("bricks", "compose", *words, "--output", one)
            done[label] = self._attached(attached, [one], ["both"])
        done["both beside each other"] = self._attached(work / "attached", adapters, ADAPTED)
        return done

    def _attached(self, output: Path, adapters: Sequence[Path], names: Sequence[str]) -> dict[str, float]:
        if not output.is_dir():
            words = ("--checkpoint", self.dense, "--adapters", *adapters, "--names", *names)
            self.commands.run("bricks", "attach", *words, "--output", output)
        found = self._kinds(output)
        shutil.rmtree(output)
        return found

    def _of_docs(self, checkpoint: Path) -> float:
        """On the windows that routers are measured on."""
        return self._cross_entropy(checkpoint, ["docs"], self._fit_windows(), self._reading())["docs"]

    def _kinds(self, checkpoint: Path) -> dict[str, float]:
        names = [f"{name}_kind" for name in (*ADAPTED, *BESIDE)]
        found = self._cross_entropy(checkpoint, names, None, self._reading())
        return {name.removesuffix("_kind"): value for name, value in found.items()}

    def _cross_entropy(
        self, checkpoint: Path, names: Sequence[str], windows: int | None, reading: Sequence[object]
    ) -> dict[str, float]:
        """Of each of these texts; of one alone its first ``windows``."""
        measured = self.output / "measured.json"
        data = ("--data", *(self.data / name for name in names), "--seq-length", SEQ_LENGTH)
        limit = () if windows is None else ("--max-windows", windows)
        self.commands.run("evaluate", "--model", checkpoint, *data, *limit, *reading, "--output", measured)
        of_each = json.loads(measured.read_text())["held_out"]
        return {name: of_each[name]["cross_entropy"] for name in names}


def _first(lines: Sequence[str], characters: int) -> list[str]:
    """As many as hold so many characters."""
    kept: list[str] = []
    while len(kept) < len(lines) and sum(map(len, kept)) < characters:
        kept.append(lines[len(kept)])
    return kept


def _checkpoints(folder: Path) -> Path:
    inside = folder / "checkpoints"
    return inside if inside.is_dir() else folder


def found(output: Path) -> dict[str, Any]:
    """Numbers of all pieces so far."""

    def numbers(path: Path, kept: Sequence[str]) -> Mapping[str, Any]:
        everything = json.loads(path.read_text())
        return {name: everything[name] for name in kept}

    pieces: dict[str, Any] = {}
    whole = ("dtype", "windows", "seq_length")
    for name, kept in {
        "neurons": (*whole, "cross_entropy", "masked"),
        "abilities": (
            *(*whole, "pruned_percent", "abilities", "cross_entropy", "cross_entropy_without"),
            *("cross_entropy_without_random", "perplexity_ratio", "own_hit_worst", "overlap"),
            *("neurons", "resident"),
        ),
        "predictors": ("dtype", "tokens", "hidden", "sparsity", "cross_entropy", "readings"),
    }.items():
        path = output / name / f"{name}.json"
        if path.is_file():
            pieces[name] = numbers(path, kept)
    for name in ("moefication", "adapters"):
        results = sorted((output / name).glob("*/result.json"))
        if results:
            pieces[name] = {path.parent.name: json.loads(path.read_text()) for path in results}
    for reading in pieces.get("predictors", {}).get("readings", ()):
        del reading["layers"]
    return pieces
