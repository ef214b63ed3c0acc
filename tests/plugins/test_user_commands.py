"""Kinds from outside go through every command, as somebody uses them who cannot change the package.

Their files are copied to a package of another name, which nothing here can know.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from tests.programs import Programs
from tests.small_source import save_small_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FILES = [
    f"{kind}{part}.py" for kind in ("fixed_decay", "relu_squared") for part in ("", "_module", "_export")
]
MODULES = "their_kinds.fixed_decay,their_kinds.relu_squared"
RECIPE = """\
plugins: [their_kinds.fixed_decay, their_kinds.relu_squared]
mixers: [fixed_decay, swa, [fixed_decay, swa], full]
feed_forwards: [dense, relu_squared]
sliding_window: 16
fixed_decay: {max_slope: 0.7}
"""
RUN = (
    *("data.train=[text]", "stage.seq_length=64", "stage.global_batch_size=2", "precision=fp32"),
    *("optimizer.lr_warmup_iters=0", "logging.log_interval=1", "logging.tensorboard=false"),
)
ALIGN = (*RUN, "stage=align", "checkpoint.load=hybrid", "stage.teacher=dense", "stage.train_iters=2")
CPT = (
    *(*RUN, "stage=cpt", "checkpoint.load=align/checkpoints", "stage.train_iters=4", "output_dir=cpt"),
    *("checkpoint.save_interval=2", "model.spiking.projections=[qkv,attention_output,mlp_fc1,mlp_fc2]"),
)


class Workplace:
    """A folder with a dense model, tokens and somebody's package."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.folder, self.programs = folder, programs
        package = folder / "packages" / "their_kinds"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        for name in FILES:
            shutil.copy(Path(__file__).parent / name, package / name)
        save_small_source(folder / "source")
        documents = [{"text": f"The for statement number {n} iterates. " * 12} for n in range(40)]
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / "text.jsonl").write_text(lines)
        (folder / "recipe.yaml").write_text(RECIPE)
        tokenize = ("--input", "text.jsonl", "--tokenizer", "source", "--output-prefix", "text")
        self.command("tools/preprocess_data.py", *tokenize)

    def command(self, script: str, *arguments: str, fails: bool = False) -> str:
        """What a command printed; ``fails`` expects an error of one sentence."""
        packages = str(self.folder / "packages")
        done = self.programs.run([str(ROOT / script), *arguments], self.folder, PYTHONPATH=packages)
        assert done.code == (2 if fails else 0), done.said[-4000:]
        return done.said

    def convert(self, *arguments: str, fails: bool = False) -> str:
        return self.command("tools/convert_checkpoint.py", *arguments, fails=fails)

    def train(self, *arguments: str, fails: bool = False, plugins: str = f"plugins=[{MODULES}]") -> str:
        return self.command("train.py", plugins, *arguments, fails=fails)

    def metrics(self, run: str) -> list[dict[str, Any]]:
        points = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [point for point in points if "train/loss" in point]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("outside"), programs)


@pytest.fixture(scope="module")
def conversion(place: Workplace) -> str:
    """The report of the conversion of a dense source."""
    place.convert("import", "--hf", "source", "--output", "dense")
    arguments = ("--hf", "source", "--output", "hybrid", "--conversion", "recipe.yaml")
    return place.convert("import", *arguments, "relu_squared.scale=0.5")


@pytest.fixture(scope="module")
def aligned(place: Workplace, conversion: str) -> str:
    return place.train(*ALIGN, "output_dir=align")


@pytest.fixture(scope="module")
def trained(place: Workplace, aligned: str) -> str:
    return place.train(*CPT)


def test_nothing_in_the_product_knows_them() -> None:
    files = [*(ROOT / "spikingbrain_train").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "train.py"]
    files += (ROOT / "conf").rglob("*.yaml")
    names = re.compile(r"\b(fixed_decay|relu_squared)(_module)?\b|\btests\.plugins\b")
    for path in files:
        assert not names.search(path.read_text(encoding="utf-8")), path


def test_a_conversion_names_what_is_new_and_what_they_do_without(conversion: str) -> None:
    assert "1 fixed_decay (slopes 0.7 to 0.004) + 1 swa (window 16)" in conversion
    assert "2 dense + 2 relu_squared (scale 0.5) layers" in conversion
    (norm,) = [line for line in conversion.splitlines() if line.startswith("fixed decay output norm")]
    assert norm.split()[4:] == ["2", "16", "new:", "constant", "0.3"]
    assert "branch weights (softmax, fixed_decay)" in conversion
    assert "2 tensors such as model.layers.1.mlp.gate_proj.weight, which have no part" in conversion


def test_a_dry_run_plans_them_and_builds_what_it_planned(place: Workplace, conversion: str) -> None:
    told = place.train(
        *(*RUN, "stage=cpt", "checkpoint.load=hybrid", "stage.train_iters=2", "dry_run=true"),
        "parallel.tensor_model_parallel_size=2",
    )
    told = " ".join(told.split())
    assert "1 fixed_decay + 1 swa + 1 [fixed_decay,swa] + 1 full" in told
    assert "feed-forwards: 2 dense + 2 relu_squared; scale 0.5" in told
    # q, k and v (64 x 32, + 64 biases) and output (32 x 32) on two ranks, and a norm of 8 on both.
    assert f"{(64 * 33 + 32 * 32) // 2 + 8:,}" in told
    assert f"{2 * 48 * 32 // 2:,}" in told


def test_an_align_stage_trains_the_swapped_mixers_alone(place: Workplace, aligned: str) -> None:
    # Two mixers of fixed decay and two of windows, one of each as branches with two norms and two weights.
    parameters = 4 * (64 * 33 + 32 * 32) + 2 * 8 + 2 * 32 + 2
    assert f"{parameters:,} of them trainable" in (place.folder / "align" / "run_details.txt").read_text()
    fitted, converted = place.folder / "align/checkpoints/iter_0000002", place.folder / "hybrid/iter_0000000"
    name = "decoder.layers.{}.mlp.linear_fc2.weight"
    before, after = MegatronCheckpointReader(converted), MegatronCheckpointReader(fitted)
    for layer in range(4):
        assert torch.equal(before.read(name.format(layer)), after.read(name.format(layer)))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(place: Workplace, trained: str) -> None:
    checkpoints = place.folder / "cpt" / "checkpoints"
    last, kept = checkpoints / "iter_0000004", place.folder / "uninterrupted"
    points = place.metrics("cpt")
    last.rename(kept)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")

    place.train(*CPT)

    names = ("train/loss", "train/grad_norm")
    assert [[point[name] for name in names] for point in place.metrics("cpt")] == [
        [point[name] for name in names] for point in points
    ]
    before, after = MegatronCheckpointReader(kept), MegatronCheckpointReader(last)
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        # Weights and optimizer; torch's loader draws from the generator whenever it begins.
        assert name.startswith("generators.") or torch.equal(before.read(name), after.read(name)), name


def test_a_changed_setting_is_refused_or_said_by_its_role(place: Workplace, trained: str) -> None:
    refused = place.train(*CPT, "stage.train_iters=5", "model.fixed_decay.max_slope=0.9", fails=True)
    assert "model.fixed_decay.max_slope=0.7 and cannot be resumed with 0.9: it would be another" in refused
    refused = place.train(*CPT, "stage.train_iters=5", "model.relu_squared.scale=2", fails=True)
    assert "model.relu_squared.scale=0.5 and cannot be resumed with 2" in refused
    said = place.train(*CPT, "stage.train_iters=5", "model.fixed_decay.init_out_norm=0.4", "output_dir=cpt")
    change = "model.fixed_decay.init_out_norm 0.3 -> 0.4 (read at the start only)"
    assert change in " ".join(said.split())


def test_wrong_settings_of_theirs_are_named(place: Workplace, conversion: str) -> None:
    start = (*RUN, "stage=cpt", "checkpoint.load=hybrid", "stage.train_iters=2", "output_dir=wrong")
    assert "did you mean model.fixed_decay.max_slope?" in place.train(
        *start, "model.fixed_decay.max_slop=1", fails=True
    )
    assert "model.fixed_decay.min_slope=1.0 is above" in place.train(
        *start, "model.fixed_decay.min_slope=1", fails=True
    )
    assert "model.relu_squared.scale=0.0 must be greater than 0" in place.train(
        *start, "model.relu_squared.scale=0", fails=True
    )


def test_an_export_carries_their_code_is_read_by_both_commands_and_comes_back(
    place: Workplace, aligned: str
) -> None:
    export = ("tools/export.py", "--checkpoint", "align", "--output", "export")
    assert "if a plugin brings it, name its package in plugins=[package.module] (--plugins of a tool)" in (
        place.command(*export, fails=True)
    )
    assert "name its package" in place.convert("inspect", "align", fails=True)
    inspected = place.convert("inspect", "align", "--plugins", MODULES)
    assert "layers:     1 fixed_decay (slopes 0.7 to 0.004)" in inspected

    told = place.command(*export, "--plugins", MODULES)
    assert "the folder brings its own modelling code" in " ".join(told.split())
    assert (place.folder / "export" / "fixed_decay_export.py").is_file()
    measure = ("tools/evaluate.py", "--data", "text", "--seq-length", "64", "--max-windows", "4", "--dtype")
    measured = [
        re.search(r"cross entropy +([\d.]+)", place.command(*measure, "float32", *model))
        for model in (
            ("--model", "export", "--trust-remote-code"),
            ("--model", "align", "--plugins", MODULES),
        )
    ]
    assert measured[0] and measured[1] and measured[0][1] == measured[1][1]
    write = ("tools/generate.py", "--model", "export", "--trust-remote-code", "--prompt", "The for")
    assert "4 written" in place.command(*write, "--max-new-tokens", "4")

    back = ("import", "--hf", "export", "--output", "back")
    assert "--plugins package.module" in place.convert(*back, fails=True)
    place.convert(*back, "--plugins", MODULES)
    iterations = ("align/checkpoints/iter_0000002", "back/iter_0000000")
    before, after = (MegatronCheckpointReader(place.folder / folder) for folder in iterations)
    for name in after.tensors:
        ours = after.read(name)
        assert torch.equal(ours, before.read(name)[: len(ours)]), name


def test_a_checkpoint_of_theirs_is_measured_and_writes_text(place: Workplace, conversion: str) -> None:
    measure = ("tools/evaluate.py", "--model", "hybrid", "--data", "text", "--seq-length", "64")
    told = place.command(*measure, "--max-windows", "4", "--plugins", MODULES)
    assert "256 tokens in 4 windows of 64" in told and "cross entropy  " in told
    assert "name its package" in place.command(*measure, fails=True)
    write = ("tools/generate.py", "--model", "hybrid", "--prompt", "The for", "--max-new-tokens", "4")
    told = place.command(*write, "--plugins", MODULES)
    assert "note: fixed_decay has no decoding step: its layers read the whole text again" in told
    assert "4 written" in told and "growing with every token" in told
    pieces = place.command(*write, "--plugins", MODULES, "--prefill-chunk", "2", fails=True)
    assert "in pieces, but fixed_decay has no decoding step" in pieces


def test_a_run_that_does_not_name_their_package_is_told_to(place: Workplace, conversion: str) -> None:
    start = (*RUN, "stage=cpt", "checkpoint.load=hybrid", "stage.train_iters=2", "output_dir=wrong")
    told = place.train(*start, plugins="plugins=[]", fails=True)
    assert "fixed_decay" in told and "plugins=[package.module]" in told
