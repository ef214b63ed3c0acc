"""When a pipeline runs a step again, what becomes of earlier results, and how it ends when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.command_line import pipelines
from spikingbrain_train.pipelines.pipeline_file import WhenChanged
from spikingbrain_train.pipelines.plan import Pipeline
from spikingbrain_train.pipelines.runner import run_pipeline
from spikingbrain_train.pipelines.state import STATE_FILE, State
from spikingbrain_train.pipelines.steps import Step, printable
from spikingbrain_train.storage.processes import ProcessName

ROOT = Path(__file__).parents[2]


def appends(path: Path, text: str = "x") -> list[str]:
    """A command that appends to a file."""
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


def ends(code: int) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit({code})"]


def writing(path: Path, text: str = "x", **changes: object) -> Step:
    """A step that appends to ``path``, which it makes."""
    step = Step(path.name, path.name, appends(path, text), makes=[path], proof=[path])
    return replace(step, **changes)  # type: ignore[arg-type]


def run(output: Path, *steps: Step, when_changed: WhenChanged = WhenChanged.remove) -> None:
    """A call of a pipeline with these steps."""
    pipeline = Pipeline("test.yaml", output, list(steps), when_changed, None, [])
    run_pipeline(pipeline, State(output), lambda: pipeline)


class TestRepetition:
    def test_finished_steps_are_skipped_and_results_of_changed_ones_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        one, two = writing(out / "one"), writing(out / "two")
        run(out, one, two)
        run(out, one, two)
        assert (out / "one").read_text() == (out / "two").read_text() == "x"
        two = writing(out / "two", "y")
        run(out, one, two)
        assert ((out / "one").read_text(), (out / "two").read_text()) == ("x", "y")
        (out / "one").unlink()
        run(out, one, two)
        assert ((out / "one").read_text(), (out / "two").read_text()) == ("x", "y")

    def test_what_builds_on_a_changed_step_is_done_again_and_nothing_else(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"

        def steps(text: str) -> list[Step]:
            first, other = writing(out / "first", text), writing(out / "other")
            return [first, other, writing(out / "second", needs={"first": first.key})]

        run(out, *steps("x"))
        capsys.readouterr()
        run(out, *steps("y"))
        said = capsys.readouterr().out
        assert "[1/3] first (to do again: its command has changed)" in said
        assert "[2/3] other: done" in said
        assert "[3/3] second (to do again: it builds on first)" in said

    def test_another_environment_leaves_results_valid(self, tmp_path: Path) -> None:
        step = writing(tmp_path / "one")
        key = step.key
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", "/elsewhere/bin/python")
            assert writing(tmp_path / "one").key == key

    def test_earlier_result_is_set_aside_where_the_pipeline_says_so(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        for text in "xyz":
            run(out, writing(out / "one", text), when_changed=WhenChanged.set_aside)
        assert (out / "one").read_text() == "z"
        assert (out / "one.superseded").read_text() == "x"
        assert (out / "one.superseded-2").read_text() == "y"

    def test_what_lies_outside_of_the_folder_is_never_removed(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("precious")
        run(tmp_path / "out", writing(tmp_path / "mine"))
        assert (tmp_path / "mine").read_text() == "x"
        assert (tmp_path / "mine.superseded").read_text() == "precious"

    def test_half_a_result_of_the_same_command_is_not_kept(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        half = f"open({str(out / 'half')!r}, 'a').write('x')"
        step = Step(
            "only",
            "only",
            [sys.executable, "-c", f"{half}; raise SystemExit(9)"],
            makes=[out / "half", out / "whole"],
            proof=[out / "whole"],
        )
        for _ in range(2):
            with pytest.raises(SystemExit):
                run(out, step, when_changed=WhenChanged.set_aside)
        assert (out / "half").read_text() == "x"
        assert not list(out.glob("*.superseded"))

    def test_interrupted_training_keeps_its_checkpoints(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        tracker = out / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
        half = (
            f"import pathlib; t = pathlib.Path({str(tracker)!r})\n"
            "t.parent.mkdir(parents=True, exist_ok=True); done = t.exists()\n"
            "t.write_text('8' if done else '4'); raise SystemExit(0 if done else 1)"
        )
        step = Step("train", "train", [sys.executable, "-c", half], makes=[out / "run"], train_iters=8)
        with pytest.raises(SystemExit) as exit_:
            run(out, step)
        assert exit_.value.code == 1
        assert State(out).describe(step) == "interrupted after iteration 4 of 8"
        run(out, step)
        assert tracker.read_text() == "8" and State(out).describe(step) == "done"

    def test_later_steps_are_planned_again_when_one_has_found_something_out(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        finds = replace(
            writing(out / "found", '{"text": "real"}'), values=out / "found", assumed={"text": "-"}
        )

        def plan() -> Pipeline:
            text = finds.read_values()["text"] if State(out).is_done(finds) else finds.assumed["text"]
            steps = [finds, writing(out / "uses", str(text))]
            return Pipeline("test.yaml", out, steps, WhenChanged.remove, None, [])

        run_pipeline(plan(), State(out), plan)
        assert (out / "uses").read_text() == "real"


class TestFailure:
    @pytest.mark.parametrize("code", [1, 2, 3, 75])
    def test_a_failed_step_ends_the_pipeline_with_its_code_and_says_how_to_go_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
    ) -> None:
        out = tmp_path / "out"
        never = writing(out / "never")
        with pytest.raises(SystemExit) as exit_:
            run(out, Step("only", "only", ends(code), proof=[out / "nothing"]), never)
        assert exit_.value.code == code and not (out / "never").exists()
        said = capsys.readouterr().err
        assert "the step only" in said and "the same command goes on from here" in said

    def test_command_without_its_result_is_not_taken_for_finished(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            run(tmp_path / "out", Step("only", "only", ends(0), proof=[tmp_path / "never"]))
        assert exit_.value.code == 2
        assert "the step only left no complete result" in capsys.readouterr().err

    def test_killed_command_is_said_to_be_killed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        with pytest.raises(SystemExit) as exit_:
            run(tmp_path / "out", Step("only", "only", dies, proof=[tmp_path / "never"]))
        assert exit_.value.code == 128 + signal.SIGKILL
        assert "was killed, as the system does when memory runs out" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGUSR1, False)]
    )
    def test_command_may_save_first_and_ends_the_pipeline_with_its_code(
        self, tmp_path: Path, number: signal.Signals, whole_group: bool
    ) -> None:
        saves = (
            "import pathlib, signal, sys, time\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            "def save(*_):\n"
            "    time.sleep(1)  # longer than subprocess.run would wait\n"
            "    (folder / 'saved').touch()\n"
            "    sys.exit(75)\n"
            f"signal.signal({int(number)}, save)\n"
            "(folder / 'ready').touch()\n"
            "time.sleep(60)\n"
        )
        out = tmp_path / "out"
        runs = (
            "import pathlib, signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from tests.pipelines.test_runner import Step, run\n"
            f"run(pathlib.Path({str(out)!r}), Step('only', 'only', [sys.executable, '-c', {saves!r}]))\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", runs],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            while not (tmp_path / "ready").exists():
                assert process.poll() is None
                time.sleep(0.02)
            (os.killpg if whole_group else os.kill)(process.pid, number)
            _, said = process.communicate(timeout=60)
        assert (tmp_path / "saved").exists() and process.returncode == 75
        assert f"the step only was interrupted by {number.name}; finished steps are kept" in said
        assert json.loads((out / STATE_FILE).read_text())["only"]["exit_code"] == 75


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells a child of its parent's death")
def test_a_step_is_told_to_end_when_its_pipeline_is_killed_and_one_that_does_not_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ignores = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path('told').touch())\n"
        "pathlib.Path('ready').touch()\n"
        "while not pathlib.Path('done').exists(): time.sleep(0.02)\n"
    )
    file = {
        "output": "out",
        "steps": {
            "only": {"kind": "command", "command": ["python", "-c", ignores], "outputs": {"file": "done"}}
        },
    }
    Path("one.yaml").write_text(json.dumps(file))
    command = [sys.executable, "-m", "spikingbrain_train.pipelines", "run", "one.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not Path("ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    while not Path("told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    step = json.loads(Path("out", STATE_FILE).read_text())["only"]["process"]["pid"]
    for words in ([], ["--fresh"]):
        with pytest.raises(SystemExit, match="2"):
            pipelines(["run", *words, "one.yaml"])
        said = capsys.readouterr().err
        assert f"the step only still runs as process {step}" in said and said.count("\n") == 1
        assert f"wait for its end, or end it with kill {step}" in said
    Path("done").touch()
    while ProcessName.of(step).is_running_here():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pipelines(["run", "one.yaml"])
    assert "all 1 steps are done" in capsys.readouterr().out


class TestFolder:
    def test_folder_of_somebody_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        with pytest.raises(ConfigurationError, match="was not made by a pipeline"):
            State(tmp_path)
        (tmp_path / STATE_FILE).write_text("[]")
        with pytest.raises(ConfigurationError, match="is damaged"):
            State(tmp_path)

    def test_steps_that_are_gone_leave_the_state(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        run(out, writing(out / "one"), writing(out / "two"))
        run(out, writing(out / "one"), writing(out / "three"))
        assert list(json.loads((out / STATE_FILE).read_text())) == ["one", "three"]


def test_printed_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = printable([sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", str(tmp_path / "c")])
    assert subprocess.run(said, shell=True, capture_output=True, text=True).stdout == "['a b', 'c']\n"
