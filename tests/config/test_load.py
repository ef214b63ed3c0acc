"""YAML to typed objects and back; what does not fit is one sentence."""

from __future__ import annotations

import dataclasses
import os

import hydra
import pytest
from omegaconf import OmegaConf

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.linear_transforms import GateEncoding, Projection, SpikingConfig
from spikingbrain_train.config.load import (
    load_conversion,
    load_model_config,
    load_run_config,
    save_config,
    to_run_config,
)
from spikingbrain_train.config.model import (
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    MoEConfig,
    ParallelHybridConfig,
)
from spikingbrain_train.config.parallel import (
    ClusterConfig,
    KernelConfig,
    LinearAttentionBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.config.run import Precision, RunConfig, WandbMode
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.config.yaml_files import conf_folder, yaml_of
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.config.small_model import small_model

MODEL = small_model(
    num_layers=3,
    mixers=[["gla", "swa"], "full"],
    gla=GatedLinearAttentionConfig(
        feature_map=FeatureMap.sigmoid, gate=GateKind.tied, init_gate_bias_max=2.5
    ),
    parallel_hybrid=ParallelHybridConfig(init_linear_weight=0.25),
    num_sink_tokens=8,
    feed_forwards=["dense", "moe"],
    moe=MoEConfig(num_experts=4, moe_ffn_hidden_size=96, capacity_factor=1.5, pad_to_capacity=True),
    spiking=SpikingConfig(projections=[Projection.qkv, Projection.mlp_fc2], k=4.0),
    norm_epsilon=1e-5,
)
RUN = RunConfig(
    model=MODEL,
    stage=StageConfig(train_iters=10, seq_length=64, global_batch_size=1),
    output_dir="outputs/a run: #1",
    precision=Precision.fp32,
)
RUN.logging.wandb = WandbMode.offline
ODD_TEXTS = [
    *("", " a ", "yes", "Off", "y", "TRUE", "null", "~", "1", "-1", "1e5", "1_000", "0x1f", ".5", "nan"),
    *("inf", "1:30", "2026-11-28", "a: b", "# a", "a #b", "- a", "'", '"', "a\nb", "ü", "日本", "%", "@a"),
    *("*", "&x", "1.0a", "x" * 200 + " " + "y" * 50, "C:\\a", "\t", "!tag", "{a}", "[a]", "?", "|", ">"),
]


def test_a_model_survives_the_way_through_yaml(tmp_path):
    save_config(MODEL, tmp_path / "model_config.yaml")
    assert load_model_config(tmp_path / "model_config.yaml") == MODEL


@pytest.mark.parametrize("values", [dataclasses.asdict(RUN), {"1": ODD_TEXTS, "off": {}, "empty": []}])
def test_configs_are_written_as_omegaconf_writes_them(values):
    assert yaml_of(values) == OmegaConf.to_yaml(OmegaConf.create(values))
    assert OmegaConf.to_container(OmegaConf.create(yaml_of({"texts": ODD_TEXTS})))["texts"] == ODD_TEXTS


def test_a_run_survives_the_way_through_yaml(tmp_path):
    save_config(RUN, tmp_path / "run_config.yaml")
    assert load_run_config(tmp_path / "run_config.yaml") == RUN


def _without_gate_encoding(path):
    """What was stored before the setting existed."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "gate_encoding" not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))


@pytest.mark.parametrize(
    ("projections", "encoding"),
    [
        ([Projection.qkv, Projection.gate], GateEncoding.each_matrix),
        ([Projection.qkv], GateEncoding.once),
        ([], GateEncoding.once),
    ],
    ids=["gate", "no gate", "no spikes"],
)
def test_a_stored_gate_without_an_encoding_keeps_the_spikes_it_was_trained_with(
    tmp_path, projections, encoding
):
    spiking = SpikingConfig(projections, GateEncoding.once, k=4.0)
    model = dataclasses.replace(MODEL, spiking=spiking)
    as_trained = dataclasses.replace(model, spiking=dataclasses.replace(spiking, gate_encoding=encoding))
    save_config(model, tmp_path / "model.yaml")
    _without_gate_encoding(tmp_path / "model.yaml")
    assert load_model_config(tmp_path / "model.yaml") == as_trained
    save_config(dataclasses.replace(RUN, model=model), tmp_path / "run.yaml")
    _without_gate_encoding(tmp_path / "run.yaml")
    assert load_run_config(tmp_path / "run.yaml").model == as_trained
    # One that is stored with it is what it says.
    save_config(model, tmp_path / "model.yaml")
    assert load_model_config(tmp_path / "model.yaml") == model


def test_stored_rotary_scaling_without_a_kind_is_that_of_llama3(tmp_path):
    for factor, kind in ((8.0, RopeType.llama3), (1.0, RopeType.default)):
        path = tmp_path / f"{kind.name}.yaml"
        save_config(dataclasses.replace(small_model(), rope_scaling=RopeScalingConfig(factor=factor)), path)
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if "rope_type" not in line]
        assert len(kept) == len(lines) - 1
        path.write_text("".join(kept))
        assert load_model_config(path).rope_scaling == RopeScalingConfig(kind, factor=factor)


def test_saving_leaves_one_whole_file_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model_config.yaml"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full)
        save_config(MODEL, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("num_layer: 3", ["num_layer is not a setting", "did you mean num_layers?"]),
        (
            "rwkv: {state: 3}",
            ["rwkv is not a setting", "if a plugin brings it", "plugins=[package.module]"],
        ),
        ("gla: {rank: 3}", ["gla.rank is not a setting", "gla has feature_map, gate, gate_low_rank_dim"]),
        ("num_layers: three", ["num_layers=three", "a whole number"]),
        ("mixers: gla", ["mixers does not fit", "a list [a,b,...]"]),
        ("qk_layernorm: maybe", ["qk_layernorm=maybe", "true or false"]),
        ("num_layers: 3", ["hidden_size", "no value"]),
        ("- gla", ["name: value"]),
        ("num_layers: [", ["not valid YAML"]),
    ],
)
def test_a_stored_model_that_does_not_fit_is_named(tmp_path, text, parts):
    path = tmp_path / "model_config.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError) as refusal:
        load_model_config(path)
    sentence = str(refusal.value)
    assert "\n" not in sentence and str(path) in sentence
    for part in parts:
        assert part in sentence


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read .*nowhere.yaml: No such file"):
        load_run_config(tmp_path / "nowhere.yaml")


def composed(**changes):
    config = OmegaConf.structured(RUN)
    OmegaConf.set_struct(config, False)
    return OmegaConf.merge(config, changes)


def test_a_dry_run_needs_no_output_folder():
    config = composed(dry_run=True)
    config.output_dir = "???"
    assert to_run_config(config).dry_run
    config.dry_run = False
    with pytest.raises(ConfigurationError, match="output_dir has no value"):
        to_run_config(config)


class TestConversion:
    def test_recipes_by_name(self):
        assert load_conversion("dense") == ConversionConfig(mixers=["full"])
        assert load_conversion("spikingbrain_7b") == ConversionConfig()

    def test_a_recipe_from_a_file_with_overrides(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("mixers: [gla, full]\ngla: {gate_low_rank_dim: 8}\n")
        recipe = load_conversion(
            str(path), ["sliding_window=128", "gla.init_gate_bias_max=1e-1", "mixers=[swa]"]
        )
        assert recipe.mixers == ["swa"]
        assert (recipe.sliding_window, recipe.gla.gate_low_rank_dim) == (128, 8)
        assert recipe.gla.init_gate_bias_max == 0.1

    def test_a_recipe_is_composed_of_others_and_of_fragments(self, tmp_path):
        (tmp_path / "base.yaml").write_text("defaults: [spikingbrain_76b]\nsliding_window: 64\nseed: 5\n")
        path = tmp_path / "mine.yaml"
        path.write_text("defaults:\n  - base\n  - _self_\n  - /layers/spikingbrain_7b@_here_\nseed: 7\n")
        expected = dataclasses.replace(
            load_conversion("spikingbrain_76b"), mixers=["gla", "swa"], sliding_window=4096, seed=7
        )
        assert load_conversion(str(path)) == expected
        # What a file says itself comes on top of its defaults, and an override on top of all.
        assert load_conversion(str(tmp_path / "base.yaml")).sliding_window == 64
        assert load_conversion(str(tmp_path / "base.yaml"), ["sliding_window=3"]).sliding_window == 3

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            (
                "defaults: [nowhere]",
                ["defaults name nowhere", "dense, gdn, mamba, prosparse, spiking", "/layers/spiking"],
            ),
            ("defaults: [/layers/nowhere@_here_]", ["defaults name /layers/nowhere@_here_"]),
            ("defaults: [{model: tiny}]", ["defaults name {'model': 'tiny'}"]),
            ("defaults: dense", ["defaults must be a list of names"]),
            ("defaults: [other]", ["lead back"]),
        ],
    )
    def test_defaults_that_are_not_there_are_named(self, tmp_path, text, parts):
        (tmp_path / "mine.yaml").write_text(text)
        (tmp_path / "other.yaml").write_text("defaults: [mine]")
        with pytest.raises(ConfigurationError) as refusal:
            load_conversion(str(tmp_path / "mine.yaml"))
        for part in (str(tmp_path / "mine.yaml"), *parts):
            assert part in str(refusal.value)

    @pytest.mark.parametrize(
        ("name", "overrides", "parts"),
        [
            (
                "spikingbrain",
                [],
                [
                    "no conversion spikingbrain",
                    "bitnet, dense, gdn, mamba, prosparse, spikingbrain_76b, spikingbrain_76b_exact",
                ],
            ),
            ("dense", ["window=3"], ["window is not a setting", "sliding_window"]),
            ("dense", ["sliding_window"], ["'sliding_window' is not name=value"]),
            ("dense", ["sliding_window=wide"], ["sliding_window=wide", "a whole number"]),
            ("dense", ["mixers=[gla"], ["cannot be read"]),
        ],
    )
    def test_a_recipe_that_does_not_fit_is_refused(self, name, overrides, parts):
        with pytest.raises(ConfigurationError) as refusal:
            load_conversion(name, overrides)
        for part in parts:
            assert part in str(refusal.value)


def test_a_stored_run_with_a_renamed_kernel_is_read(tmp_path):
    kernels = KernelConfig(LinearAttentionBackend.naive, SoftmaxAttentionBackend.naive)
    run = dataclasses.replace(RUN, cluster=ClusterConfig(kernels=kernels))
    path = tmp_path / "run_config.yaml"
    save_config(run, path)
    old = path.read_text().replace("gated_linear_attention: naive", "gated_linear_attention: recurrent")
    path.write_text(old.replace("softmax_attention: naive", "softmax_attention: reference"))
    assert "naive" not in path.read_text()
    assert load_run_config(path) == run


@pytest.mark.parametrize(
    ("name", "old"), [("gated_linear_attention", "recurrent"), ("softmax_attention", "reference")]
)
def test_a_renamed_kernel_is_refused_with_its_name(name, old):
    values = OmegaConf.structured(RUN)
    composed = OmegaConf.create(OmegaConf.to_container(values, enum_to_str=True))
    composed.cluster.kernels[name] = old
    with pytest.raises(ConfigurationError, match=rf"kernels\.{name}={old} .*{old} is called naive now"):
        to_run_config(composed)


@pytest.mark.parametrize("more", [(), ("hydra.searchpath=[]",), ("~hydra/launcher",)])
def test_what_hydra_composes_for_itself_is_no_part_of_a_run(more):
    """Left out, which is faster, it leaves what Hydra composes with it."""
    overrides = ["model=tiny_hybrid", "output_dir=anywhere", *more]
    composed = compose_run(overrides)
    with hydra.initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
        assert composed == hydra.compose("config", overrides=overrides)
