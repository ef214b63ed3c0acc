"""What the demo does: a list of steps, each a command that a user could type."""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.data.folders import LeftOut, files_below
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.pipelines.demo.budget import Lengths, fit, read_speed
from spikingbrain_train.pipelines.demo.named_settings import NamedSettings
from spikingbrain_train.pipelines.demo.smollm2 import NAME
from spikingbrain_train.pipelines.demo.stages import (
    beside_own,
    check_stage_arguments,
    stage_arguments,
    windows,
)
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_iteration

_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_DOCUMENT_CHARS = 4000
"""A book is cut into documents of that size, or there would be nothing to hold out."""
PYDOC_TOPICS = "pydoc-topics"
MEASURE = "measure"
SPEED_FILE = "demo_speed.json"


@dataclass(frozen=True)
class DemoOptions:
    """What the demo is run on."""

    root: Path
    """The checkout: where train.py and tools/ lie."""
    output: Path
    """Folder of everything that the demo makes, the downloaded model apart."""
    cache: Path
    """Folder of the downloaded model."""
    model: Path | None = None
    """Dense Hugging Face folder to start from; None downloads SmolLM2-135M-Instruct."""
    data: Sequence[str] = (PYDOC_TOPICS,)
    """Inputs of tools/preprocess_data.py."""
    text_key: str | None = None
    """Field of JSON lines that holds the text."""
    prompt: str | None = None
    """Text that the exported model continues."""
    align_args: Sequence[str] = ()
    """Further arguments of train.py in the align stage."""
    cpt_args: Sequence[str] = ()
    """Further arguments of train.py in the cpt stage."""
    lengths: Lengths = field(default_factory=Lengths)
    """How long the stages are on this machine; the two fields above come behind it and win."""

    @property
    def fits_lengths(self) -> bool:
        """Whether the stages' lengths are fitted to the machine: not if the user names both."""
        return not all(self.named.in_stage(stage, "stage.train_iters") for stage in ("align", "cpt"))

    @property
    def named(self) -> NamedSettings:
        """What the user names himself."""
        return NamedSettings(self.align_args, self.cpt_args)

    @property
    def source(self) -> Path:
        """The dense Hugging Face folder."""
        return self.model if self.model is not None else self.cache / NAME


@dataclass(frozen=True)
class Step:
    """One command, and how to see that it is done."""

    name: str
    title: str
    """What the command does, in a few words."""
    command: list[str]
    makes: list[Path] = field(default_factory=list)
    """Files and folders that belong to this step alone: removed before it is done anew."""
    proof: list[Path] = field(default_factory=list)
    """Files that exist once the step is complete; none of them is written before the end."""
    fingerprint: str = ""
    """What the result depends on besides the command and the steps before."""
    train_iters: int | None = None
    """For training: the iteration whose checkpoint completes the step. An interrupted one goes on by
    itself."""

    def is_complete(self) -> bool:
        """Whether the result lies there in full."""
        if self.train_iters is not None:
            return latest_iteration(self.makes[0] / CHECKPOINT_FOLDER) == self.train_iters
        return all(path.exists() for path in self.proof)


def demo_steps(options: DemoOptions) -> list[Step]:
    """The steps in their order.

    Raises:
        ConfigurationError: an override that train.py would refuse, or stages that cannot be compared.
        DataError: ``options.model`` is not a Hugging Face folder.
    """
    output, source = options.output, options.source
    tools = options.root / "tools"
    python = sys.executable
    text, held_out = output / "data" / "text", output / "data" / "text_valid"
    dense, hybrid = output / "dense", output / "hybrid"
    align, cpt, export = output / "align", output / "cpt", output / "export"
    places = {
        "align": stage_arguments("align", hybrid, align, text, dense),
        "cpt": stage_arguments("cpt", align / CHECKPOINT_FOLDER, cpt, text, dense),
    }
    stages, fitted = {}, {"align": options.lengths.align_args, "cpt": options.lengths.cpt_args}
    for name, own in (("align", options.align_args), ("cpt", options.cpt_args)):
        recipe = [*places[name], *fitted[name]]
        stages[name] = [*recipe, *beside_own(name, recipe, options.named), *own]
    runs = {name: compose_run(arguments) for name, arguments in stages.items()}
    for arguments in stages.values():
        check_stage_arguments(arguments, source)
    evaluated = {name: windows(run) for name, run in runs.items()}
    if evaluated["align"] != evaluated["cpt"]:
        raise ConfigurationError(
            "the stages are evaluated on different text (align: {0[1]} windows of {0[0]} tokens, cpt: "
            "{1[1]} of {1[0]}); give both the same stage.seq_length and the same logging.eval_iters * "
            "stage.global_batch_size".format(evaluated["align"], evaluated["cpt"])
        )
    seq_length, max_windows = evaluated["align"]

    def convert(recipe: str, folder: Path) -> list[str]:
        script = [python, str(tools / "convert_checkpoint.py"), "import"]
        return [*script, "--hf", str(source), "--output", str(folder), "--conversion", recipe]

    def train(name: str) -> list[str]:
        # One rank needs no launcher; torchrun would bury a sentence of train.py under its own report.
        return [python, str(options.root / "train.py"), *stages[name]]

    def evaluate(model: Path, result: Path, *extra: str) -> list[str]:
        script = [python, str(tools / "evaluate.py"), "--model", str(model), "--data", str(held_out)]
        # One format on every machine, so that reports can be held against each other.
        script += ["--dtype", "float32"]
        window = ["--seq-length", str(seq_length), "--max-windows", str(max_windows)]
        return [*script, *window, "--output", str(result), *extra]

    dense_result, export_result = output / "evaluate_dense.json", output / "evaluate_export.json"
    generation, speed = output / "generate.json", output / SPEED_FILE
    steps = [
        Step(
            "preprocess",
            f"tokenize {', '.join(options.data)}, part of it held out",
            _preprocess(options, text),
            makes=[output / "data"],
            proof=[output / "data" / f"text_{part}.json" for part in ("train", "valid")],
            fingerprint=_stamp(options),
        ),
        Step(
            "dense",
            "copy the dense model into Megatron's format: the teacher",
            convert("dense", dense),
            makes=[dense],
            proof=[dense / "latest_checkpointed_iteration.txt"],
        ),
        Step(
            "hybrid",
            "swap its attention for GLA, SWA, GLA, SWA ...",
            convert("spikingbrain_7b", hybrid),
            makes=[hybrid],
            proof=[hybrid / "latest_checkpointed_iteration.txt"],
        ),
        Step(
            MEASURE,
            "measure how fast this machine trains",
            [
                *(python, str(tools / "measure_speed.py"), "--output", str(speed)),
                *("--align", *places["align"], *options.align_args),
                # The pretraining stage starts from what alignment has yet to write: from the hybrid here.
                *("--cpt", *stage_arguments("cpt", hybrid, cpt, text, dense), *options.cpt_args),
            ],
            makes=[speed],
            proof=[speed],
        ),
        Step(
            "evaluate_dense",
            "evaluate the dense model with transformers",
            evaluate(source, dense_result),
            makes=[dense_result],
            proof=[dense_result],
        ),
        Step(
            "align",
            "align stage: the new mixers learn to reproduce attention",
            train("align"),
            makes=[align],
            fingerprint=OmegaConf.to_yaml(runs["align"]),
            train_iters=runs["align"].stage.train_iters,
        ),
        Step(
            "cpt",
            "cpt stage: all parameters learn to predict the next token",
            train("cpt"),
            makes=[cpt],
            fingerprint=OmegaConf.to_yaml(runs["cpt"]),
            train_iters=runs["cpt"].stage.train_iters,
        ),
        Step(
            "export",
            "export to Hugging Face format",
            [
                *(python, str(tools / "export.py")),
                *("--checkpoint", str(cpt / CHECKPOINT_FOLDER), "--output", str(export)),
            ],
            makes=[export],
            proof=[export / "config.json"],
        ),
        Step(
            "evaluate_export",
            "read the export back with transformers and evaluate it",
            # The code in this folder is this project's own, written there a step ago.
            evaluate(export, export_result, "--trust-remote-code"),
            makes=[export_result],
            proof=[export_result],
        ),
        Step(
            "generate",
            "generate from its recurrent state",
            [
                *(python, str(tools / "generate.py"), "--model", str(export)),
                *("--prompt", _prompt(options), "--max-new-tokens", "64", "--temperature", "0.6"),
                *("--output", str(generation), "--trust-remote-code"),
            ],
            makes=[generation],
            proof=[generation],
        ),
    ]
    if not options.fits_lengths:
        steps = [step for step in steps if step.name != MEASURE]
    if options.model is None:
        download = [python, str(tools / "download_smollm2.py"), "--output", str(source)]
        steps.insert(0, Step("download", f"get {NAME}", download, proof=[source / "config.json"]))
    elif not (source / "config.json").is_file():
        raise DataError(f"--model {source} is not a Hugging Face folder: config.json is missing")
    return steps


def step_keys(steps: Sequence[Step]) -> list[str]:
    """One digest per step of its command, its inputs and all steps before it."""
    keys: list[str] = []
    for step in steps:
        before = keys[-1] if keys else ""
        content = json.dumps([before, step.name, step.command, step.fingerprint])
        keys.append(hashlib.sha256(content.encode()).hexdigest())
    return keys


def _preprocess(options: DemoOptions, prefix: Path) -> list[str]:
    command = [sys.executable, str(options.root / "tools" / "preprocess_data.py"), "--input", *options.data]
    command += [
        "--tokenizer",
        str(options.source),
        "--output-prefix",
        str(prefix),
        "--valid-fraction",
        "0.15",
    ]
    if options.text_key is not None:
        command += ["--text-key", options.text_key]
    stem = options.data[0].removesuffix(".gz").removesuffix(".zst")
    if len(options.data) == 1 and stem.endswith(_TEXT_SUFFIXES):
        command += ["--max-text-chars", str(_DOCUMENT_CHARS)]
    return command


def fitted_lengths(options: DemoOptions, minutes: float, spent: float) -> Lengths:
    """How long the stages are on this machine, whose speed lies measured in ``options.output``.

    Args:
        options: of the demo.
        minutes: what it may take.
        spent: seconds that it has taken so far.

    Raises:
        ConfigurationError: what was measured cannot be read.
    """
    output = options.output
    here = (output, output, output / "data" / "text", output / "dense")
    align, cpt = (
        compose_run([*stage_arguments(stage, *here), *args])
        for stage, args in (("align", options.align_args), ("cpt", options.cpt_args))
    )
    held_out = _read_tokens(output / "data" / "text_valid.json")
    return fit(read_speed(output / SPEED_FILE), align, cpt, minutes, spent, held_out, options.named)


def _read_tokens(sidecar: Path) -> int:
    try:
        return int(json.loads(sidecar.read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{sidecar} cannot be read; run the demo with --fresh") from None


def _prompt(options: DemoOptions) -> str:
    if options.prompt is not None:
        return options.prompt
    return "The for statement" if list(options.data) == [PYDOC_TOPICS] else "The"


def _stamp(options: DemoOptions) -> str:
    """Names, sizes and times of the user's files, so that a changed input is noticed."""
    given = [str(options.model)] if options.model is not None else []
    found = (Path(path) for name in [*given, *options.data] for path in glob.glob(name, recursive=True))
    files = (file for path in found for file in (files_below(path, LeftOut()) if path.is_dir() else [path]))
    marks = ((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return json.dumps(sorted(marks))
