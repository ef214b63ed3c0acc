"""The run_config.yaml of a checkpoint can be given back as the config of a run."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from spikingbrain_train.config.blend import blend
from spikingbrain_train.config.compose import compose_from_command_line, compose_run
from spikingbrain_train.config.load import load_run_config, save_config, to_run_config
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    WandbMode,
)
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from tests.config.small_dataset import write_dataset
from tests.config.small_model import small_model, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def stored(tmp_path: Path) -> RunConfig:
    """A run that differs from the defaults in every section."""
    return RunConfig(
        model=small_model(mixers=["full", ["gla", "swa"]]),
        stage=StageConfig(train_iters=7, seq_length=16, global_batch_size=2),
        data=DataConfig(train=blend([write_dataset(tmp_path / "tokens", documents=5)], [2.0])),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=1e-4),
        checkpoint=CheckpointConfig(save_interval=3),
        logging=LoggingConfig(log_interval=2, wandb=WandbMode.offline),
        output_dir=str(tmp_path / "a run: #1"),
        precision=Precision.fp32,
        seed=7,
    )


@pytest.fixture
def file(tmp_path: Path, stored: RunConfig) -> Path:
    save_config(stored, tmp_path / "run_config.yaml")
    return tmp_path / "run_config.yaml"


def given(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> RunConfig:
    """The run that ``train.py`` with these arguments is."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    composed = compose_from_command_line()
    assert composed is not None
    assert sys.argv == ["train.py", *arguments]
    return to_run_config(composed)


def test_a_stored_config_is_the_same_run_again(monkeypatch, stored, file, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for arguments in (
        ("--config", str(file)),
        (f"--config={file}",),
        ("--config", str(file.parent)),
        ("--config-dir", str(file.parent), "--config-name", "run_config"),
    ):
        assert given(monkeypatch, *arguments) == stored
    check_run_config(stored, world_size=1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_printed_config_is_the_same_run_again(monkeypatch, capsys, tmp_path):
    load = write_checkpoint(tmp_path / "hybrid", small_model(), iteration=3)
    arguments = (f"checkpoint.load={load}", f"output_dir={tmp_path / 'run'}", "model.sliding_window=5")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--cfg", "job"])
    assert compose_from_command_line() is None
    printed = capsys.readouterr().out
    assert "${" not in printed and "sliding_window: 5" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    again = given(monkeypatch, "--config", str(tmp_path / "printed.yaml"))
    assert again == given(monkeypatch, *arguments)


def test_a_config_printed_before_its_checkpoint_was_there_takes_the_model_from_it(
    monkeypatch, capsys, tmp_path
):
    load = tmp_path / "hybrid"
    arguments = (f"checkpoint.load={load}", f"output_dir={tmp_path / 'run'}", "model.sliding_window=5")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--cfg", "job"])
    assert compose_from_command_line() is None
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    write_checkpoint(load, small_model(), iteration=3)
    again = given(monkeypatch, "--config", str(tmp_path / "printed.yaml"))
    assert again == given(monkeypatch, *arguments)
    assert again.model.sliding_window == 5


def test_single_settings_override_it(monkeypatch, stored, file):
    run = given(monkeypatch, "optimizer.lr=1e-5", "--config", str(file), "output_dir=elsewhere", "seed=9")
    assert (run.optimizer.lr, run.output_dir, run.seed) == (1e-5, "elsewhere", 9)
    assert dataclasses.replace(run.optimizer, lr=3e-3) == stored.optimizer and run.model == stored.model


def test_a_choice_from_a_group_takes_the_place_of_its_section(monkeypatch, stored, file):
    run = given(monkeypatch, "--config", str(file), "parallel=pp2", "logging=default")
    assert run.parallel == ParallelConfig(pipeline_model_parallel_size=2)
    assert run.logging == LoggingConfig()
    assert run.stage == stored.stage


def test_an_experiment_beside_it_is_refused(monkeypatch, file):
    with pytest.raises(ConfigurationError, match="leaves no place for an experiment"):
        given(monkeypatch, "--config", str(file), "experiment=smollm2_cpt")
    with pytest.raises(ConfigurationError, match="leave --config-dir and --config-name out"):
        given(monkeypatch, "--config", str(file), "--config-dir", "conf")


def test_a_file_that_is_no_config_of_a_run_is_named(monkeypatch, file, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere\.yaml"):
        given(monkeypatch, "--config", str(tmp_path / "nowhere.yaml"))
    file.write_text(file.read_text().replace("seed:", "sead:"))
    with pytest.raises(CheckpointError, match=r"run_config\.yaml: sead is not a setting; did you mean seed"):
        given(monkeypatch, "--config", str(file))
    with pytest.raises(ConfigurationError, match=r"--config <run_config\.yaml>"):
        given(monkeypatch, "--config")


def test_degrees_that_earlier_releases_wrote_out_are_accepted(monkeypatch, stored, file):
    degrees = dataclasses.replace(stored.parallel, data_parallel_size=1, expert_tensor_parallel_size=1)
    save_config(dataclasses.replace(stored, parallel=degrees), file)
    check_run_config(given(monkeypatch, "--config", str(file)), world_size=1)


@pytest.mark.parametrize(
    ("kind", "weight", "now"),
    [("cpt", 0.0, ("cpt", None)), ("align", 0.0, ("align", None)), ("cpt", 0.3, ("distill", 0.3))],
)
def test_distillation_that_earlier_releases_stored_as_a_weight_of_cpt_is_a_stage(
    stored, file, kind, weight, now
):
    distillation = dataclasses.replace(stored.stage.distillation, weight=weight)
    stage = dataclasses.replace(stored.stage, kind=kind, distillation=distillation)
    save_config(dataclasses.replace(stored, stage=stage), file)
    run = load_run_config(file)
    assert (run.stage.kind, run.stage.distillation.weight) == now


def test_a_finished_run_given_back_says_so_before_torch_and_ends_well(monkeypatch, capsys, stored, tmp_path):
    checkpoint = Path(stored.output_dir) / "checkpoints" / "iter_0000007"
    write_checkpoint(checkpoint.parent, stored.model, iteration=7, run=stored)
    before = sorted(tmp_path.rglob("*"))
    for named in (checkpoint / "run_config.yaml", checkpoint, stored.output_dir):
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(named)])
        runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        said = capsys.readouterr().out
        assert said.startswith(f"nothing is left to do: {checkpoint} is at iteration 7 of ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_blend_of_an_earlier_release_is_read(file: Path, stored: RunConfig) -> None:
    (prefix,) = stored.data.train_prefixes
    entries = f"  train:\n  - prefix: {prefix}\n    weight: 2.0\n"
    now = file.read_text()
    assert entries in now
    for earlier, train in (
        (f"  train:\n  - {prefix}\n  train_weights:\n  - 2.0\n", stored.data.train),
        (f"  train:\n  - {prefix}\n  train_weights: null\n", [prefix]),
    ):
        file.write_text(now.replace(entries, earlier))
        assert load_run_config(file).data.train == train
    file.write_text(now.replace(entries, f"  train:\n  - {prefix}\n  train_weights: [1, 2]\n"))
    with pytest.raises(CheckpointError, match=r"write data.train=\[\{prefix: a, weight: 0.7\}"):
        load_run_config(file)


def test_a_blend_is_written_as_prefixes_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("output_dir=o", "stage.train_iters=1", "stage.seq_length=8", "model=tiny_hybrid")
    run = to_run_config(
        compose_run([*arguments, "data.train=[{prefix: a, weight: 0.7}, {prefix: b, weight: 3}]"])
    )
    assert (run.data.train_prefixes, run.data.train_weights) == (["a", "b"], [0.7, 3.0])
    run = to_run_config(compose_run([*arguments, "data.train=[a,b]"]))
    assert (run.data.train_prefixes, run.data.train_weights) == (["a", "b"], None)
