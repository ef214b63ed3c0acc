"""Sources whose mixers stay: hybrids that are upcycled to experts, and sources with windows of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingForm
from spikingbrain_train.config.load import load_conversion, load_model_config
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.hf_models import HFCheckpoint, all_tensors
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed.pool import RankPool


def stored(folder: Path):
    return load_model_config(folder / "iter_0000000/model_config.yaml")


def test_a_hybrid_is_upcycled_to_experts(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("qwen2")
    recipe = ConversionConfig(mixers=["gla", "swa", "gla", "full"], sliding_window=7)
    recipe.gla.init_gate_std, recipe.gla.rotary = 1.0, True
    import_checkpoint(source, tmp_path / "hybrid", recipe)
    export_checkpoint(tmp_path / "hybrid", tmp_path / "export")

    with pytest.raises(CheckpointError, match="is a hybrid already.* keep_mixers=true"):
        import_checkpoint(tmp_path / "export", tmp_path / "no", ConversionConfig(feed_forwards=["moe"]))
    upcycling = load_conversion("upcycling", ["moe.num_experts=4", "moe.router_topk=2"])
    assert upcycling.upcycling.form is UpcyclingForm.exact
    report = import_checkpoint(tmp_path / "export", tmp_path / "experts", upcycling)
    assert "4 moe (4 experts, top-2" in report.layers
    before, after = stored(tmp_path / "hybrid"), stored(tmp_path / "experts")
    assert (after.mixers, after.gla.rotary, after.sliding_window) == (before.mixers, True, 7)
    one_rank = ParallelConfig()
    (expected,) = ranks.run(megatron_logits, tmp_path / "hybrid", world_size=1, parallel=one_rank)
    (found,) = ranks.run(megatron_logits, tmp_path / "experts", world_size=1, parallel=one_rank)
    assert (found - expected).abs().max() <= 2e-4


def test_experts_of_a_source_stay_when_its_mixers_are_swapped(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, model = hf_checkpoint("qwen3_moe")
    import_checkpoint(source, tmp_path / "megatron")
    (found,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ParallelConfig())
    with torch.no_grad():
        assert (found - model(TOKENS).logits).abs().max() <= 2e-4
    export_checkpoint(tmp_path / "megatron", tmp_path / "again")
    ours, theirs = all_tensors(tmp_path / "again"), all_tensors(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    assert now == was

    report = import_checkpoint(source, tmp_path / "hybrid", ConversionConfig(sliding_window=7))
    assert "3 moe (4 experts, top-2, + 0 shared of width 24)" in report.layers
    export_checkpoint(tmp_path / "hybrid", tmp_path / "export")
    (found,) = ranks.run(megatron_logits, tmp_path / "hybrid", world_size=1, parallel=ParallelConfig())
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32
    )
    with torch.no_grad():
        assert (found - exported.eval()(TOKENS).logits).abs().max() <= 2e-4
    fewer = ConversionConfig(feed_forwards=["moe"], moe=MoEConfig(num_experts=2))
    with pytest.raises(ConfigurationError, match="has 4 experts, top-2.* already"):
        import_checkpoint(source, tmp_path / "no", fewer)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_windows_of_a_source_stay_where_nobody_changes_them(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str
) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    listed = {"use_sliding_window": True, "sliding_window": 7, "layer_types": types}
    source, _ = hf_checkpoint(family, **(listed if family == "qwen3" else {}))
    import_checkpoint(source, tmp_path / "dense")
    assert stored(tmp_path / "dense").mixers == (["swa", "full"] if family == "qwen3" else ["swa"])
    export_checkpoint(tmp_path / "dense", tmp_path / "export")
    ours, theirs = all_tensors(tmp_path / "export"), all_tensors(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "export"))
    assert now == was

    report = import_checkpoint(
        source, tmp_path / "hybrid", ConversionConfig(mixers=["gla", "swa", "swa", "full"], sliding_window=4)
    )
    notes = "\n".join(report.notes)
    assert ("layers 1, 2 saw 7 tokens" in notes) is (family == "mistral")
    assert ("layers 2 saw 7 tokens in the source and sees 4" in notes) is (family == "qwen3")
    assert ("layers 3 saw 7 tokens in the source and sees all" in notes) is (family == "mistral")
