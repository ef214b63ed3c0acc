"""Everything in conf/ composes, and runs as far as a plan."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spikingbrain_train.config.checks import check_run_config
from spikingbrain_train.config.compose import groups, register_schema
from spikingbrain_train.config.load import conf_folder, load_conversion, to_run_config
from spikingbrain_train.config.model import Mixer, ModelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.schema import setting_types
from spikingbrain_train.parallel.costs import total_parameters
from spikingbrain_train.parallel.planner import launched_world_size, plan_run

YAML_FILES = sorted(conf_folder().rglob("*.yaml"))
CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]


@pytest.fixture(scope="module", autouse=True)
def hydra_in_conf():
    register_schema()
    with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
        yield


def dry_run(*overrides: str) -> RunConfig:
    """Compose, check and plan."""
    config = to_run_config(compose("config", overrides=[*overrides, "dry_run=true"]))
    world_size = launched_world_size(config)
    check_run_config(config, world_size)
    assert plan_run(config, world_size).render()
    return config


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(conf_folder())))
def test_every_file_says_what_it_is_for(path):
    comments = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert any(len(comment) > 20 and "@package" not in comment for comment in comments)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_choice_makes_a_plan(group, choice, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if choice == "from_checkpoint":
        return  # test_load.py has a checkpoint for it
    overrides = [f"{group}={choice}"]
    if group not in ("model", "experiment"):
        overrides.append("model=tiny_hybrid")
    elif choice in ("smollm2_align", "smollm2_cpt"):
        overrides.append("model=smollm2_135m_hybrid")
    if choice in ("align", "cpt_distill"):
        overrides.append("stage.teacher=dense")
    if choice == "adamw_wsd":
        overrides.append("optimizer.lr_wsd_decay_iters=100")
    dry_run(*overrides)


def test_from_checkpoint_asks_for_every_setting_of_a_model():
    model = OmegaConf.load(conf_folder() / "model" / "from_checkpoint.yaml")

    def leaves(node, prefix=""):
        for name in node:
            if OmegaConf.is_dict(node._get_node(name)):
                yield from leaves(node._get_node(name), f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", node._get_node(name)._value()

    expected = {
        name: f"${{model_of_checkpoint:${{checkpoint.load}},{name}}}"
        for name, kind in setting_types(ModelConfig)
        if not dataclasses.is_dataclass(kind)
    }
    assert dict(leaves(model)) == expected


def test_an_experiment_wins_over_the_groups_and_the_command_line_over_both():
    config = dry_run("experiment=spikingbrain_7b_8k", "stage.micro_batch_size=1")
    assert config.model.layer_mixers() == [Mixer.gla, Mixer.swa] * 14
    assert config.parallel.data_parallel_size == 8 and config.parallel.pipeline_model_parallel_size == 4
    assert config.stage.seq_length == 8192 and config.stage.micro_batch_size == 1


@pytest.mark.parametrize(
    ("choice", "parameters"),
    [
        # Counted by transformers over the published models' configs.
        ("smollm2_135m", 134_515_008),
        ("qwen2_5_7b", 7_615_616_512),
    ],
)
def test_dense_sizes_are_the_published_ones(choice, parameters):
    assert total_parameters(dry_run(f"model={choice}").model) == parameters


def test_hybrid_models_are_their_dense_source_in_the_published_pattern():
    recipe = load_conversion("spikingbrain_7b")
    for dense, hybrid in (("smollm2_135m", "smollm2_135m_hybrid"), ("qwen2_5_7b", "spikingbrain_7b")):
        source, model = dry_run(f"model={dense}").model, dry_run(f"model={hybrid}").model
        source.mixers, source.sliding_window, source.gla = recipe.mixers, recipe.sliding_window, recipe.gla
        assert model == source
