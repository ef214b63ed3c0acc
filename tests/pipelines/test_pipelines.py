"""Pipelines as users write and call them: references, variables, plugins, dry run, status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run, groups
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.pipelines.command_line import pipelines
from spikingbrain_train.pipelines.kinds import STEP_KINDS, Context, StepKind
from spikingbrain_train.pipelines.kinds.train import hydra_value
from spikingbrain_train.pipelines.pipeline_file import load_pipeline
from spikingbrain_train.pipelines.plan import plan_pipeline
from tests.evaluation.multiple_choice.small_tasks import write_tasks
from tests.pipelines.planned import steps_of

ROOT = Path(__file__).parents[2]

TWO_STEPS = """\
output: out
variables:
  text: hello
  words: [a, b]
steps:
  second:
    kind: command
    command: [python, -c, "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read() * 2)",
      "${steps.first.file}", "${output}/second", "${words}"]
    outputs: {file: "${output}/second"}
  first:
    kind: command
    title: write ${text} for ${words}
    command: [python, -c, "import sys; open(sys.argv[1], 'w').write(sys.argv[2])",
      "${output}/first", "${text}"]
    outputs: {file: "${output}/first"}
show: ${steps.second.file}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(TWO_STEPS)
    return tmp_path


def test_steps_run_in_the_order_of_their_references_and_only_once(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines(["run", "two.yaml"])
    said = capsys.readouterr().out
    assert said.index("[1/2] write hello for a, b") < said.index("[2/2] run python")
    assert said.endswith("hellohello\n")
    pipelines(["run", "two.yaml"])
    again = capsys.readouterr().out
    assert again.count(": done (") == 2 and again.endswith("hellohello\n") and "-c" not in again


def test_arguments_change_variables_settings_and_what_follows(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines(["run", "two.yaml", "text=x", "output=elsewhere"])
    assert (workplace / "elsewhere" / "second").read_text() == "xx" and not (workplace / "out").exists()
    pipelines(["run", "two.yaml", "output=elsewhere", "steps.first.title=again"])
    assert (workplace / "elsewhere" / "second").read_text() == "hellohello"
    assert (workplace / "elsewhere" / "second.superseded").read_text() == "xx"
    assert "[1/2] again (to do again: its command has changed)" in capsys.readouterr().out


def test_a_list_takes_its_place_in_a_list_item_by_item(workplace: Path) -> None:
    assert steps_of("two.yaml")["second"].command[-2:] == ["a", "b"]
    assert steps_of("two.yaml", "words=[]")["second"].command[-1] == "out/second"


def test_an_empty_list_is_said_where_the_flag_may_have_no_value() -> None:
    """`sweep: []` counts spikes of one k; without it the command has a sweep of its own."""
    kind, context = STEP_KINDS["analyze_spikes"], Context("spikes", Path("out"), {})
    given = {"model": "m", "text": ["a.txt", "pydoc-topics"], "windows": 2}
    step = kind.plan(context, {**given, "sweep": []})
    words = " ".join(step.command)
    assert "--sweep" not in " ".join(kind.plan(context, given).command)
    assert words.endswith("--text a.txt pydoc-topics --windows 2 --sweep --output out/spikes")
    assert step.reads == {"model": "m", "text[0]": "a.txt"}
    assert step.outputs == {"result": "out/spikes/spikes.json", "page": "out/spikes/spikes.html"}


@pytest.mark.parametrize(
    "command", [["dry-run", "two.yaml"], ["run", "--dry-run", "two.yaml"], ["status", "two.yaml"]]
)
def test_looking_writes_nothing(
    workplace: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines(command)
    said = capsys.readouterr().out
    assert "first" in said and "to do" in said
    assert [path.name for path in workplace.iterdir()] == ["two.yaml"]


def test_status_and_dry_run_tell_what_is_done_and_what_has_changed(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines(["run", "two.yaml"])
    capsys.readouterr()
    pipelines(["status", "two.yaml"])
    assert "2 of 2 steps are done, in out" in capsys.readouterr().out
    pipelines(["status", "two.yaml", "text=x"])
    said = capsys.readouterr().out
    assert "first   to do again: its command has changed" in said
    assert "second  to do again: it builds on first" in said
    pipelines(["dry-run", "two.yaml"])
    assert "# [1/2] first: write hello for a, b (done)" in capsys.readouterr().out


def test_commands_of_a_dry_run_can_be_pasted(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipelines(["dry-run", "two.yaml"])
    (workplace / "out").mkdir()
    done = subprocess.run(capsys.readouterr().out, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (workplace / "out" / "second").read_text() == "hellohello"


@pytest.mark.parametrize(
    "words", [["-m", "spikingbrain_train.pipelines"], [str(ROOT / "tools/run_pipeline.py")]]
)
def test_both_commands_run_a_pipeline(workplace: Path, words: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words, "run", "two.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("hellohello\n"), done.stderr


def test_one_pipeline_at_a_time_fills_a_folder(workplace: Path) -> None:
    waits = "import time, pathlib; pathlib.Path('ready').touch(); time.sleep(60)"
    (workplace / "one.yaml").write_text(
        "output: out\nsteps:\n  only:\n    kind: command\n    outputs: {x: out/x}\n"
        f"    command: [python, -c, {waits!r}]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "spikingbrain_train.pipelines", "run", "one.yaml"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as first:
        while not (workplace / "ready").exists():
            assert first.poll() is None
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
        first.terminate()
        _, said = first.communicate(timeout=60)
    assert second.returncode == 2 and "is in use by another run" in second.stderr
    assert first.returncode == 143 and "the step only was interrupted by SIGTERM" in said


def test_a_kind_from_elsewhere_is_one_file_and_a_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "my_steps.py").write_text(
        "from spikingbrain_train.pipelines.kinds import STEP_KINDS, StepKind\n"
        "from spikingbrain_train.pipelines.steps import Step\n"
        "class Touch(StepKind):\n"
        "    name = 'touch'\n"
        "    def settings(self):\n        return {'file': True}\n"
        "    def plan(self, context, given):\n"
        "        return Step(context.name, 'touch', ['touch', given['file']])\n"
        "STEP_KINDS.register(Touch())\n"
    )
    (workplace / "plugin.yaml").write_text(
        "output: out\nplugins: [my_steps]\nsteps: {only: {kind: touch, file: touched}}\n"
    )
    monkeypatch.syspath_prepend(workplace)
    try:
        pipelines(["run", "plugin.yaml"])
    finally:
        STEP_KINDS._registered.pop("touch", None)
    assert (workplace / "touched").exists()


@pytest.mark.parametrize("kind", STEP_KINDS, ids=lambda kind: kind.name)
def test_every_kind_says_what_it_does_and_what_it_takes(kind: StepKind) -> None:
    assert kind.title and kind.settings() and kind.__class__.__doc__


def test_settings_of_a_tool_are_the_flags_of_its_parser_and_its_ranks() -> None:
    settings = STEP_KINDS["evaluate"].settings()
    assert [name for name, must_be_given in settings.items() if must_be_given] == ["model"]
    assert {"data", "output", "seq_length", "reset_at_documents", "tasks", "nproc_per_node"} < settings.keys()
    assert not {"help", "dry_run"} & settings.keys()
    assert "nproc_per_node" not in STEP_KINDS["export"].settings()


@pytest.mark.parametrize(
    "value", ["it's, a [b]=c", "a b", "/x/y-1.2", "${x}y".replace("$", ""), 3, 1e-5, True, None]
)
def test_values_reach_train_py_as_they_are(value: object) -> None:
    run = compose_run(
        [f"output_dir={hydra_value(str(value))}", f"data.train={hydra_value([str(value), 'b'])}"]
    )
    assert run.output_dir == str(value) and list(run.data.train) == [str(value), "b"]
    blend = [{"prefix": str(value), "weight": 0.7}, {"prefix": "b", "weight": 0.3}]
    assert list(compose_run([f"data.train={hydra_value(blend)}"]).data.train) == blend


def test_pipelines_are_no_group_of_a_run() -> None:
    assert "pipeline" not in groups()


def test_the_pages_examples_work(workplace: Path) -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    (workplace / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    steps = steps_of("mine.yaml", "steps.cpt.nproc_per_node=2", "steps.cpt.settings.optimizer.lr=2e-4")
    assert list(steps) == ["tokens", "hybrid", "cpt", "export"]
    assert "data.train=[outputs/mine/tokens/text_train]" in steps["cpt"].command
    assert "optimizer.lr=2e-4" in steps["cpt"].command
    (workplace / "my.yaml").write_text(
        "output: out\nplugins: [docs_example]\nsteps: {shelf: {kind: upload, model: x}}\n"
    )
    (workplace / "docs_example.py").write_text(page.split("```python\n")[1].split("```")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(workplace)
        assert steps_of("my.yaml")["shelf"].command == ["my-upload", "x", "out/receipt.txt"]
    STEP_KINDS._registered.pop("upload")


def test_everything_of_an_earlier_preprocessing_is_cleared_away(tmp_path: Path) -> None:
    """Also what only conversations or domains have: a loss mask left behind would not fit the new tokens."""
    file = tmp_path / "own.yaml"
    file.write_text(
        "output: out\nsteps:\n  data: {kind: preprocess, input: text.jsonl, tokenizer: tokenizer}\n"
    )
    made = {path.name for path in steps_of(str(file))["data"].makes}
    assert made == {f"text{end}" for end in (".bin", ".idx", ".json", ".loss_mask", ".domains.npy")}


EVALUATION = """\
output: out
steps:
  tasks:
    kind: evaluate
    model: model
    tokenizer: tokenizer
    tasks: piqa
    task_data: tasks
    plot: ${output}/tasks.png
  beside:
    kind: evaluate
    model: model
    data: [text]
    teacher: teacher
    probes: needle_text
    probe_text: hay.txt
"""


def test_an_evaluation_is_done_anew_when_any_file_that_it_reads_has_changed(tmp_path: Path) -> None:
    (tmp_path / "evaluate.yaml").write_text(EVALUATION)
    for folder in ("model", "tokenizer", "teacher"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "hay.txt").write_text("hay")
    (tmp_path / "text.bin").write_text("tokens")
    piqa = write_tasks(tmp_path / "tasks") / "piqa/validation.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        steps = steps_of("evaluate.yaml")
        assert steps["tasks"].outputs == {"result": "out/tasks.json", "picture": "out/tasks.png"}
        assert Path("out/tasks.png") in steps["tasks"].makes and Path("out/tasks.png") in steps["tasks"].proof
        read: dict[str, tuple[str | Path, ...]] = {
            "tasks": ("tokenizer/config.json", piqa),
            "beside": ("teacher/config.json", "hay.txt"),
        }
        for name, files in read.items():
            for file in files:
                before = steps_of("evaluate.yaml")
                with Path(file).open("a") as opened:
                    opened.write("\n")
                after = steps_of("evaluate.yaml")
                changed = {step for step in before if before[step].key != after[step].key}
                assert changed == {name}, file


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ("tasks: piqa", "tasks: piqua", "step tasks: --tasks names 'piqua', which is none of"),
        ("task_data: tasks", "limit: 3", "step tasks: --tasks reads local files; name the folder"),
        ("task_data: tasks", "task_data: nowhere", r"step tasks \(task_data\): nowhere does not exist"),
        ("teacher: teacher", "teacher: nowhere", r"step beside \(teacher\): nowhere does not exist"),
        ("probes: needle_text", "probes: nedle", "step beside: --probes names nedle, which is no probe"),
        ("tasks.png", "tasks.gif", "step tasks: --plot out/tasks.gif ends in none of .png"),
        ("tasks.png", "tasks.json", "step tasks: --plot out/tasks.json ends in none of .png"),
        (
            "data: [text]",
            "nproc_per_node: 3\n    parallel: [pp2]",
            "step beside: the world size 3 is not divisible by parallel.tensor_model_parallel_size=1 x",
        ),
        ("data: [text]", "parallel: [tp2]", "step beside: the world size 1 is not divisible by"),
        (
            "data: [text]",
            "nproc_per_node: 2\n    parallel: [tp22]",
            "step beside: parallel=tp22 does not exist",
        ),
        ("data: [text]", "seq_length: 0", "step beside: --seq-length is 0; give at least 1"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything_runs(
    right: str, wrong: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evaluate.yaml").write_text(EVALUATION.replace(right, wrong))
    for folder in ("model", "tokenizer", "teacher"):
        Path(folder).mkdir()
    Path("hay.txt").write_text("hay")
    Path("text.bin").write_text("tokens")
    write_tasks(Path("tasks"))
    with pytest.raises(SpikingBrainError, match=sentence):
        plan_pipeline(load_pipeline("evaluate.yaml"), lambda _: False)
