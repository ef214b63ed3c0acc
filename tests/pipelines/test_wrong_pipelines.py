"""Whatever is wrong with a pipeline is one sentence that names file and step, before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.pipelines.pipeline_file import load_pipeline
from spikingbrain_train.pipelines.plan import plan_pipeline

ROOT = Path(__file__).parents[2]

RIGHT = """\
output: out
variables:
  model: model
  folder: ${output}/results
steps:
  dense:
    kind: convert
    hf: ${model}
  cpt:
    kind: train
    settings:
      model: tiny_hybrid
      checkpoint.load: ${steps.dense.checkpoint}
      data.train: [text]
  export:
    kind: export
    checkpoint: ${steps.cpt.checkpoint}
    output: ${folder}/export
"""

# (what is replaced, what by, the sentence behind the file's name)
WRONG = [
    ("steps:", "stepps:", ": stepps is not a part of a pipeline; did you mean steps?"),
    ("output: out", "output: out\nsteps: {}", "is not valid YAML"),
    ("steps:", "steps: [", "is not valid YAML"),
    (RIGHT, "- a\n- b\n", "must hold name: value lines"),
    (RIGHT, "output: out\n", ": steps must hold name: value lines"),
    (RIGHT, "output: out\nsteps: {}\n", ": steps is empty"),
    (RIGHT, "output: out\nsteps: {dense: convert}\n", ": step dense must hold name: value lines"),
    (
        "kind: convert",
        "kind: covert",
        ", step dense: kind names covert, which is no kind of step; did you mean convert?",
    ),
    (
        "kind: convert",
        "title: x",
        ", step dense: kind=None does not fit: every step has one, e.g. kind: train",
    ),
    ("hf:", "hff:", ", step dense: hff is not a setting of convert; did you mean hf?"),
    ("    hf: ${model}\n", "", ", step dense: hf is missing, which every convert needs"),
    ("settings:", "setings:", ", step cpt: setings is not a setting of train; did you mean settings?"),
    (
        "steps.dense.",
        "steps.dens.",
        ", step cpt: ${steps.dens.checkpoint} refers to a step that is not there; did",
    ),
    (
        "dense.checkpoint",
        "dense.checkpont",
        ", step cpt: ${steps.dense.checkpont} is not an output of dense; did",
    ),
    (
        "${model}",
        "${modle}",
        ", step dense: ${modle} refers to a variable that is not there; did you mean model?",
    ),
    ("${output}", "${outptu}", ": folder refers to ${outptu}, which is not there; did you mean output?"),
    ("${output}", "${folder}", ": these steps wait for each other: folder -> folder"),
    ("model: model", "model: ${steps.dense.checkpoint}", ": model refers to a step; only steps can do that"),
    ("model: model", "model: ???", ": model has no value; give model=... on the command line"),
    ("model: model", "checkout: x", ": the variable checkout has a meaning"),
    (
        "hf: ${model}",
        "hf: ${steps.export.model}",
        ": these steps wait for each other: dense -> export -> cpt",
    ),
    ("model: model", "model: nowhere", ", step dense (hf): nowhere does not exist"),
    ("[text]", "[nowhere]", ", step cpt (data.train[0]): nowhere.bin does not exist"),
    ("${steps.cpt.checkpoint}", "nowhere", ", step export (checkpoint): nowhere does not exist"),
    (
        "${steps.cpt.checkpoint}",
        "out/cpt",
        ", step export: checkpoint=out/cpt is made by the step cpt; refer to it",
    ),
    ("${folder}/export", "out/cpt/x", ", step export: out/cpt/x lies in the way of the step cpt"),
    (
        "${folder}/export",
        "${folder}\n    dtype: int3",
        ", step export: argument --dtype: invalid choice: 'int3'",
    ),
    ("${folder}/export", "[a, b]", ", step export: output takes one value, not ['a', 'b']"),
    (
        "${folder}/export",
        "x\n    overwrite: 3",
        ", step export: overwrite=3 does not fit: overwrite takes true or",
    ),
    ("hf: ${model}", "hf: x\n    conversion: nothing", ", step dense: there is no conversion nothing"),
    ("model: tiny", "stage.seq: 3\n      model: tiny", ", step cpt: stage.seq is not a setting"),
    (
        "model: tiny",
        "stage.train_iters: -1\n      model: tiny",
        ", step cpt: stage.train_iters=-1 must be at least 0",
    ),
    ("model: tiny", "output_dir: x\n      model: tiny", ", step cpt: output_dir is not given among settings"),
    (
        "    settings:",
        "    nproc_per_node: 0\n    settings:",
        ", step cpt: nproc_per_node=0 must be a whole number",
    ),
    (
        "    settings:",
        "    launch: missing-program\n    settings:",
        ", step cpt: the program missing-program is not",
    ),
    (
        "steps:",
        "when_changed: never\nsteps:",
        ": when_changed=never does not fit; it takes set_aside or remove",
    ),
    (
        "model: tiny_hybrid",
        "model: tiny_hybrid\n      logging.evaluators: [spikingbrain_train.evaluation.held_out.HeldOut]",
        ", step cpt: logging.evaluators names spikingbrain_train.evaluation.held_out.HeldOut, which cannot",
    ),
    (
        "model: tiny_hybrid",
        "model: tiny_hybrid\n      logging.evaluators: [{path: "
        "spikingbrain_train.evaluation.probes.evaluator.LongContextProbes, settings: {length: 1k}}]",
        ", step cpt: logging.evaluators: the settings of spikingbrain_train.evaluation.probes.evaluator.Lon",
    ),
    (
        "model: tiny_hybrid",
        "model: tiny_hybrid\n      callbacks: [no.such.Callback]",
        ", step cpt: callbacks names no.such.Callback, which cannot be imported: No module",
    ),
    ("steps:", "plugins: [no.such]\nsteps:", ": plugins names no.such, which cannot be imported: No module"),
    ("steps:", "plugins: [spoilt]\nsteps:", ": plugins names spoilt, which cannot be imported: "),
    ("steps:", "plugins: no.such\nsteps:", ": plugins must be a list of modules"),
    ("steps:", "show: ${steps.cpt.x}\nsteps:", ": show refers to ${steps.cpt.x}, which is not there"),
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "text.bin").touch()
    (tmp_path / "spoilt.py").write_text("1 / 0")
    return tmp_path


def plan(*arguments: str) -> list[str]:
    """Names of the steps of ``test.yaml``."""
    file = load_pipeline("test.yaml", arguments)
    return [step.name for step in plan_pipeline(file, lambda _: False).steps]


def test_the_pipeline_that_is_spoilt_below_is_right(workplace: Path) -> None:
    (workplace / "test.yaml").write_text(RIGHT)
    assert plan() == ["dense", "cpt", "export"]


@pytest.mark.parametrize(("old", "new", "sentence"), WRONG, ids=[new[:60] for _, new, _ in WRONG])
def test_a_wrong_pipeline_is_one_sentence(workplace: Path, old: str, new: str, sentence: str) -> None:
    assert old in RIGHT
    (workplace / "test.yaml").write_text(RIGHT.replace(old, new, 1))
    with pytest.raises(SpikingBrainError) as refusal:
        plan()
    said = str(refusal.value)
    assert "test.yaml" in said and sentence in said and "\n" not in said
    files = {path.name for path in workplace.iterdir()} - {"__pycache__"}  # of a plugin, by Python
    assert files == {"model", "spoilt.py", "test.yaml", "text.bin"}


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("modle=x", "modle is not a variable; did you mean model?"),
        ("model", "the argument 'model' is not name=value"),
        ("model=[", "the value of 'model=[' cannot be read as YAML"),
        ("steps.dens.hf=x", "there is no step dens; did you mean dense?"),
        ("steps.dense=x", "steps.dense=x names no setting"),
        ("steps.dense.hff=x", "step dense: hff is not a setting of convert; did you mean hf?"),
        ("model=nowhere", "step dense (hf): nowhere does not exist"),
    ],
)
def test_a_wrong_argument_is_one_sentence(workplace: Path, argument: str, sentence: str) -> None:
    (workplace / "test.yaml").write_text(RIGHT)
    with pytest.raises(SpikingBrainError) as refusal:
        plan(argument)
    assert sentence in str(refusal.value)


def test_the_command_says_it_with_exit_code_2_without_torch(workplace: Path) -> None:
    (workplace / "test.yaml").write_text(RIGHT.replace("kind: export", "kind: exprt"))
    runs = (
        "import sys\nfrom spikingbrain_train.pipelines.command_line import pipelines\n"
        "try:\n    pipelines(['run', 'test.yaml'])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", runs], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == (
        "error: test.yaml, step export: kind names exprt, which is no kind of step; did you mean export? "
        "known are analyze_sparsity, analyze_spikes, choose_layers, command, convert, evaluate, export, "
        "generate, preprocess, train; name the package of another in plugins: [package.module]\n"
    )
