"""The converted weights compute what transformers computes from the source and from the export.

Bound of every comparison: 2e-4 on float32 logits of order 1-10; two correct implementations differ by
summation order, which stays below 1e-5 here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import GatedLinearAttentionConfig, GateKind
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.conversion.hf_models import HFCheckpoint, all_tensors
from tests.conversion.megatron_models import TOKENS, logits_and_save, megatron_logits, parameters_of_stage
from tests.distributed.pool import RankPool

TOLERANCE = 2e-4
ONE_RANK = ParallelConfig()
TENSOR_PARALLEL = ParallelConfig(tensor_model_parallel_size=2)
PIPELINE_PARALLEL = ParallelConfig(pipeline_model_parallel_size=2)


def transformers_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.1  # logits that say nothing would agree, too
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "llama3_rope", "biased_llama", "mistral", "qwen2", "qwen3"])
def test_imported_dense_model_agrees_with_transformers(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, tied: bool
) -> None:
    source, _ = hf_checkpoint(family, tie_word_embeddings=tied)
    import_checkpoint(source, tmp_path / "megatron")
    (logits,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    assert_close(logits, transformers_logits(source))


def test_a_dense_model_of_no_family_is_exported_with_the_code_of_hybrids(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """No class of transformers has both biases and q/k norms; the carried one has, with full attention."""
    source, _ = hf_checkpoint("qwen3")
    import_checkpoint(source, tmp_path / "hybrid", ConversionConfig(mixers=["gla", "swa"]))
    export_checkpoint(tmp_path / "hybrid", tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    layers = list(range(config["num_hidden_layers"]))
    config |= {"attn_layers": layers, "full_attention_layers": layers, "attention_bias": True}
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    tensors = {
        n: t for n, t in all_tensors(tmp_path / "folder").items() if "gk_proj" not in n and "g_norm" not in n
    }
    for name in [name for name in tensors if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]:
        tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, tmp_path / "folder/model.safetensors", metadata={"format": "pt"})
    import_checkpoint(tmp_path / "folder", tmp_path / "megatron")
    assert load_model_config(tmp_path / "megatron/iter_0000000/model_config.yaml").mixers == ["full"]
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    assert report.architecture == "GLAswaForCausalLM"
    exported = all_tensors(tmp_path / "export")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
    (logits,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    assert_close(logits, transformers_logits(tmp_path / "export"))


@pytest.mark.parametrize("family", ["llama3_rope", "biased_llama", "qwen2", "qwen3"])
def test_exported_hybrid_agrees_with_the_megatron_model(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str
) -> None:
    source, _ = hf_checkpoint(family)
    recipe = ConversionConfig(mixers=["gla", "swa", "gla", "full"], sliding_window=7)
    recipe.gla.init_gate_std = 1.0  # gates that differ between tokens and channels
    import_checkpoint(source, tmp_path / "megatron", recipe)
    export_checkpoint(tmp_path / "megatron", tmp_path / "hybrid")
    (logits,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    assert_close(logits, transformers_logits(tmp_path / "hybrid"))


OPTIONS = GatedLinearAttentionConfig(
    init_gate_std=1.0, qk_norm=True, rotary=True, num_query_groups=4, output_gate=True
)


@pytest.mark.parametrize(("family", "gate"), [("llama3_rope", GateKind.low_rank), ("qwen3", GateKind.fixed)])
def test_options_of_linear_layers_are_exported_and_imported_again(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, gate: GateKind
) -> None:
    source, _ = hf_checkpoint(family)
    recipe = ConversionConfig(mixers=["gla", "swa", "gla", "full"], sliding_window=7)
    recipe.gla = replace(OPTIONS, gate=gate)
    import_checkpoint(source, tmp_path / "megatron", recipe)
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "hybrid")
    assert ("q/k norms in linear layers alone" in str(report.notes)) is (family != "qwen3")
    assert ("fixed decay" in str(report.notes)) is (gate is GateKind.fixed)
    for option in ("rotary positions in linear layers", "output gate", "4 query groups in linear layers"):
        assert option in str(report.notes)
    (logits,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    assert_close(logits, transformers_logits(tmp_path / "hybrid"))

    import_checkpoint(tmp_path / "hybrid", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "hybrid_again")
    ours, theirs = all_tensors(tmp_path / "hybrid_again"), all_tensors(tmp_path / "hybrid")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hybrid", "hybrid_again")
    )
    assert next(configs) == next(configs)


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)], ids=["untied", "tied"])
def test_tensor_parallel_ranks_agree_and_what_they_save_exports_bit_identically(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, tied: bool
) -> None:
    """101 vocabulary rows become 256 over two ranks, and 101 again; q/k/v and gates are split by groups."""
    source, _ = hf_checkpoint(family, tie_word_embeddings=tied)
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig(sliding_window=7))
    export_checkpoint(tmp_path / "megatron", tmp_path / "hybrid")
    logits = ranks.run(
        logits_and_save, tmp_path / "megatron", tmp_path / "saved", world_size=2, parallel=TENSOR_PARALLEL
    )
    assert_close(logits[0], transformers_logits(tmp_path / "hybrid"))

    saved = MegatronCheckpointReader(tmp_path / "saved/iter_0000003").tensors
    written = MegatronCheckpointReader(tmp_path / "megatron/iter_0000000").tensors
    assert saved.keys() == written.keys()  # the mapping table knows a real model's keys
    assert saved["embedding.word_embeddings.weight"].size[0] == 256
    assert len(saved["decoder.layers.0.mlp.linear_fc2.weight"].chunks) == 2
    export_checkpoint(tmp_path / "saved", tmp_path / "hybrid_again")
    ours, theirs = all_tensors(tmp_path / "hybrid_again"), all_tensors(tmp_path / "hybrid")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_biases_of_all_projections_are_split_over_ranks_and_saved(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("biased_llama")
    import_checkpoint(source, tmp_path / "megatron")
    logits = ranks.run(
        logits_and_save, tmp_path / "megatron", tmp_path / "saved", world_size=2, parallel=TENSOR_PARALLEL
    )
    assert_close(logits[0], transformers_logits(source))
    export_checkpoint(tmp_path / "saved", tmp_path / "again")
    ours, theirs = all_tensors(tmp_path / "again"), all_tensors(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_pipeline_stages_hold_the_layers_of_their_half(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, tied: bool
) -> None:
    source, _ = hf_checkpoint("qwen2", tie_word_embeddings=tied)
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig())
    reader = MegatronCheckpointReader(tmp_path / "megatron/iter_0000000")
    stages = ranks.run(parameters_of_stage, tmp_path / "megatron", world_size=2, parallel=PIPELINE_PARALLEL)
    seen = set()
    for first_layer, held in zip((0, 2), stages, strict=True):
        for name, tensor in held.items():
            layer = name.removeprefix("decoder.layers.").partition(".")[0]
            if layer.isdecimal():
                name = name.replace(f"layers.{layer}.", f"layers.{int(layer) + first_layer}.", 1)
            if tied and name == "output_layer.weight":  # the last stage's copy of the embedding
                name = "embedding.word_embeddings.weight"
            expected = reader.read(name)
            assert torch.equal(tensor[: len(expected)], expected), name
            seen.add(name)
    assert seen == reader.tensors.keys()
