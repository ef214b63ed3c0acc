"""Hugging Face -> Megatron -> Hugging Face returns the same bits; exported hybrids load in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.conversion.hf_models import HFCheckpoint, all_tensors


def assert_same_tensors(folder: Path, other: Path) -> None:
    ours, theirs = all_tensors(folder), all_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "llama3_rope", "qwen2", "qwen3"])
def test_dense_round_trip_is_bit_identical(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, tied: bool
) -> None:
    source, _ = hf_checkpoint(family, tie_word_embeddings=tied)
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig(mixers=["full"]))
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_round_trip_is_bit_identical(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, _ = hf_checkpoint("qwen2", dtype=dtype, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", max_shard_size=10_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert_same_tensors(tmp_path / "back", source)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == all_tensors(source).keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == dtype


def test_mixed_dtypes_survive(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """Norms in float32 over bfloat16 matrices, and tensors of odd size in front of wider ones."""
    source, model = hf_checkpoint("llama", dtype=torch.bfloat16, vocab_size=33, hidden_size=36, head_dim=8)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(source)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)


@pytest.mark.parametrize("family", ["llama3_rope", "qwen2", "qwen3"])
def test_hybrid_exports_to_transformers_and_imports_again(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str
) -> None:
    source, dense = hf_checkpoint(family)
    mixers = ["gla", "swa", "gla", "full"]
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig(mixers=mixers, sliding_window=5))
    export_checkpoint(tmp_path / "megatron", tmp_path / "hybrid")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", trust_remote_code=True)
    assert model.config.model_type == "gla_swa"
    assert model.config.eos_token_id == dense.config.eos_token_id
    state = model.state_dict()
    assert torch.equal(
        state["model.layers.1.attn.k_proj.weight"], dense.model.layers[1].self_attn.k_proj.weight
    )
    assert (tmp_path / "hybrid/tokenizer.json").exists()
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()

    import_checkpoint(tmp_path / "hybrid", tmp_path / "megatron2")
    first, second = (
        load_model_config(tmp_path / name / "iter_0000000/model_config.yaml")
        for name in ("megatron", "megatron2")
    )
    assert second.layer_mixers() == first.layer_mixers() == [(mixer,) for mixer in mixers]
    assert second == first
    export_checkpoint(tmp_path / "megatron2", tmp_path / "hybrid2")
    assert_same_tensors(tmp_path / "hybrid2", tmp_path / "hybrid")


def test_export_casts_on_request(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, model = hf_checkpoint("qwen3")
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16)
    for name, tensor in all_tensors(tmp_path / "back").items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_redundant_tensors_are_left_out_and_reported(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """Old transformers versions stored the rotary buffer, and some exporters store a tied output layer."""
    from safetensors.torch import save_file

    source, _ = hf_checkpoint("llama", tie_word_embeddings=True)
    tensors = all_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = import_checkpoint(source, tmp_path / "megatron")
    assert [entry.split(" ")[0] for entry in report.ignored] == [
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
