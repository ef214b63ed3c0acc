"""``model=from_checkpoint`` is the model in checkpoint.load, single settings come on top of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run, groups
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.config.changes import changed, other
from tests.config.small_model import small_model, write_checkpoint


def unlike_the_defaults() -> ModelConfig:
    """A model of which no setting has its default."""
    model = small_model(mixers=[["gla", "swa"], "full"], feed_forwards=["moe"])
    model.spiking.projections = [Projection.qkv]
    model.quantization.projections = [Projection.qkv]
    model.ternary.projections = model.int8_inputs.projections = [Projection.mlp_fc1]
    model.q8_inputs.projections = [Projection.mlp_fc2]
    model.moe.trained = [0]
    model.rope_scaling.short_factor, model.rope_scaling.long_factor = [1.0, 2.0], [3.0, 4.0]
    for name, default in leaves(ModelConfig()).items():
        if default == leaves(model)[name]:
            model = changed(model, name, other(default))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write_checkpoint(tmp_path / "hybrid", unlike_the_defaults(), iteration=3)


def composed(*overrides: str) -> RunConfig:
    return to_run_config(compose_run(["dry_run=true", *overrides]))


def test_every_setting_comes_from_the_checkpoint(folder: str) -> None:
    model = composed(f"checkpoint.load={folder}").model
    assert model == unlike_the_defaults()
    for name, default in leaves(ModelConfig()).items():
        assert leaves(model)[name] != default, name


def test_a_checkpoint_that_takes_the_place_of_another_one_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: another folder at the same relative path, and one that is not there any more."""
    monkeypatch.chdir(tmp_path)
    for layers in (2, 4):
        folder = Path(write_checkpoint(tmp_path / str(layers), small_model(num_layers=layers), iteration=3))
        folder.rename("hybrid")
        assert composed("checkpoint.load=hybrid").model.num_layers == layers
        Path("hybrid").rename(f"gone_{layers}")
    with pytest.raises(CheckpointError):
        composed("checkpoint.load=hybrid")


def test_single_settings_of_the_command_line_come_on_top(folder: str) -> None:
    model = composed(
        f"checkpoint.load={folder}",
        "model.max_position_embeddings=32768",
        "model.gla.init_gate_bias_max=1.0",
        "model.mixers=[full]",
    ).model
    stored = unlike_the_defaults()
    assert model == dataclasses.replace(
        stored,
        max_position_embeddings=32768,
        gla=dataclasses.replace(stored.gla, init_gate_bias_max=1.0),
        mixers=["full"],
    )


def test_an_experiment_comes_on_top_of_it_and_the_command_line_on_top_of_both(
    folder: str, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\n"
        f"checkpoint: {{load: {folder}}}\nmodel: {{sliding_window: 17, rotary_base: 5.0}}\n"
    )
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    model = composed(searched, "experiment=mine", "model.rotary_base=7.0").model
    assert model == dataclasses.replace(unlike_the_defaults(), sliding_window=17, rotary_base=7.0)


def test_without_a_checkpoint_the_alternatives_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"checkpoint\.load.*null.*model=smollm2_135m_hybrid"):
        composed()


def test_a_folder_that_is_no_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.load=nowhere is not a folder"):
        composed("checkpoint.load=nowhere")


def test_a_setting_that_no_model_has_is_named(folder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.sliding_windw is not a setting; did you mean"):
        composed(f"checkpoint.load={folder}", "model.sliding_windw=3")
    with pytest.raises(
        ConfigurationError, match=r"model\.rwkv is not a setting; .*if a plugin brings it, name"
    ):
        composed(f"checkpoint.load={folder}", "model.rwkv.state=3")


@pytest.mark.parametrize("choice", ["small", "outputs/small", "a/b/c"])
def test_the_choices_of_the_group_are_the_files(choice: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        composed(f"model={choice}")
    sentence = str(refusal.value)
    assert sentence.startswith(f"model={choice} does not exist")
    assert sentence.endswith(f"model is one of {', '.join(groups()['model'])}")
