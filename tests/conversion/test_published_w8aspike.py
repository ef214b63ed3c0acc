"""The published W8ASpike layout both ways: the same numbers, and the same bits.

Bound of logits: 2e-4, of order 1-10 in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import FeatureMap, GatedLinearAttentionConfig, GateKind, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.ops.int8_groups import group_scales
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE
from tests.conversion.hf_models import all_tensors
from tests.conversion.megatron_models import TOKENS, logits_and_save, megatron_logits
from tests.conversion.published_w8aspike import (
    PublishedW8ASpikeModel,
    tensor_shapes,
    write_published_folder,
)
from tests.distributed.pool import RankPool

TOLERANCE = 2e-4
ROUNDED = [Projection.qkv, Projection.gate, Projection.attention_output, Projection.mlp_fc1]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w8aspike")
    write_published_folder(folder / "published")
    report = import_checkpoint(folder / "published", folder / "megatron")
    number = len(tensor_shapes())
    assert report.checked == f"all {number} tensors accounted for by checksum: {number} carried over"
    return folder


def of_megatron(ranks: RankPool, folder: Path) -> torch.Tensor:
    (logits,) = ranks.run(megatron_logits, folder, world_size=1, parallel=ParallelConfig())
    return logits


def test_an_imported_checkpoint_computes_what_the_published_class_does(
    published: Path, ranks: RankPool
) -> None:
    assert_close(of_megatron(ranks, published / "megatron"), published / "published")
    model = load_model_config(published / "megatron/iter_0000000/model_config.yaml")
    assert model.gla.gate is GateKind.full_rank and model.spiking.queries
    assert model.quantization.stored_scales and model.quantization.projections == ROUNDED


def test_stored_scales_are_split_with_the_weights_and_saved_whole(
    published: Path, ranks: RankPool, tmp_path: Path
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    logits, _ = ranks.run(
        logits_and_save, published / "megatron", tmp_path / "saved", world_size=2, parallel=parallel
    )
    assert_close(logits, published / "published")
    export_checkpoint(tmp_path / "saved", tmp_path / "export")
    same(tmp_path / "export", published / "published")


def assert_close(logits: torch.Tensor, folder: Path) -> None:
    """To those of the published class, up to the first token on which rounding alone decides."""
    model = PublishedW8ASpikeModel(folder)
    expected = model.logits(TOKENS)
    assert expected.std() > 0.1 and model.doubtful is not None
    for row, known, doubtful in zip(logits, expected, model.doubtful, strict=True):
        sure = doubtful.int().cumsum(0) == 0
        assert sure.sum() >= 10, "windows of 7 are left behind"
        assert (row - known)[sure].abs().max() <= TOLERANCE


def same(folder: Path, other: Path) -> None:
    tensors, expected = all_tensors(folder), all_tensors(other)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_way_back_is_bit_identical_and_loads_with_its_own_code(published: Path, tmp_path: Path) -> None:
    report = export_checkpoint(published / "megatron", tmp_path / "export")
    same(tmp_path / "export", published / "published")
    assert not any("published modelling code" in note for note in report.notes)
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits = model.eval()(TOKENS).logits
    assert_close(logits, published / "published")
    model.save_pretrained(tmp_path / "again")
    same(tmp_path / "again", published / "published")
    assert json.loads((tmp_path / "again/config.json").read_text())["w8aspike"]["layout"] == "published"


def test_a_model_that_was_trained_with_int8_weights_goes_into_the_published_layout(
    published: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """Its scales follow from its weights; stored ones that are these give the same model."""
    export_checkpoint(published / "megatron", tmp_path / "first")
    plain = {k: v for k, v in all_tensors(tmp_path / "first").items() if "weight_quantizer" not in k}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain/model.safetensors")
    config = json.loads((tmp_path / "first/config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("w8aspike", "spiking")}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    (tmp_path / "plain/tokenizer.json").write_text("{}")
    import_checkpoint(tmp_path / "plain", tmp_path / "megatron")
    path = tmp_path / "megatron/iter_0000000" / MODEL_CONFIG_FILE
    model = OmegaConf.load(path)
    names = [each.value for each in ROUNDED]
    model.quantization = {"projections": names, "group_size": 128, "keys_and_values": True}
    model.spiking = {"projections": names, "k": 3.0, "queries": True}
    OmegaConf.save(model, path)

    export_checkpoint(tmp_path / "megatron", tmp_path / "export", format_name="w8aspike")
    tensors = all_tensors(tmp_path / "export")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    scales = tensors["model.layers.1.mlp.down_proj.weight_quantizer.scales"]
    assert torch.equal(scales.squeeze(-1), group_scales(weight, 128))
    expected = of_megatron(ranks, tmp_path / "megatron")
    assert_close(expected, tmp_path / "export")

    # The same model as INT8 numbers, which the code in the folder multiplies.
    export_checkpoint(tmp_path / "megatron", tmp_path / "int8")
    int8 = all_tensors(tmp_path / "int8")
    assert int8["model.layers.0.attn.gk_proj.weight"].dtype == torch.int8
    assert int8["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", trust_remote_code=True)
    with torch.no_grad():
        assert_close(loaded(TOKENS).logits, tmp_path / "export")


def form(**changes: Any) -> ModelConfig:
    """A model that the published class computes."""
    model = ModelConfig(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=64,
        vocab_size=101,
        add_qkv_bias=True,
        mixers=["gla", "swa"],
        gla=GatedLinearAttentionConfig(gate=GateKind.full_rank),
        spiking=SpikingConfig(list(ROUNDED), queries=True),
        quantization=QuantizationConfig(list(ROUNDED), keys_and_values=True),
    )
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(model, section) if section else model, field, value)
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gla__gate": GateKind.low_rank}, "a low_rank gate"),
        ({"gla__feature_map": FeatureMap.sigmoid}, "gla.feature_map=sigmoid"),
        ({"spiking__k": 4.0}, "spikes with k 4"),
        ({"spiking__queries": False}, "queries without spikes"),
        ({"quantization__group_size": 64}, "groups of 64 weights"),
        ({"quantization__keys_and_values": False}, "float keys and values"),
        ({"quantization__projections": list(Projection)}, "INT8 weights elsewhere than in qkv, gate"),
        ({"ffn_hidden_size": 192}, "inputs that 128 does not divide"),
        ({"mixers": ["gla", "gla", "swa", "swa"]}, r"softmax attention in layers \[2, 3\]"),
    ],
)
def test_what_the_published_class_computes_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    assert format_of_model(form(), "w8aspike").name == "w8aspike"
    with pytest.raises(CheckpointError, match=f"^--format w8aspike cannot hold {words}.*; leave --format"):
        format_of_model(form(**changes), "w8aspike")


def test_a_folder_that_lacks_scales_is_refused(published: Path, tmp_path: Path) -> None:
    name = "model.layers.1.attn.o_proj.weight_quantizer.scales"
    tensors = all_tensors(published / "published")
    del tensors[name]
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text((published / "published/config.json").read_text())
    with pytest.raises(CheckpointError, match=f"the tensor {name} of GLAswaForCausalLM is missing"):
        import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
