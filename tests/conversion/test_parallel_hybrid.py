"""Dense checkpoints in the SpikingBrain-76B form: two branches, sinks, tied gate, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import (
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    MoEConfig,
    ParallelHybridConfig,
)
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.hf_models import HFCheckpoint, all_tensors
from tests.conversion.megatron_models import logits_and_save, megatron_logits
from tests.conversion.test_attention_scale import scale_of
from tests.distributed.pool import RankPool

ATTENTION = "decoder.layers.{layer}.self_attention."
LAYERS = "3 [gla,swa] (window 7) + 1 [gla,full]; 2 dense + 2 moe (4 experts, top-1, + 1 shared of width 48)"


def recipe(**changes: Any) -> ConversionConfig:
    """Every part of the 76B: GLA beside windows (three layers) and full attention, sinks, dense and moe."""
    settings: dict[str, Any] = {
        "mixers": [["gla", "swa"], ["gla", "swa"], ["gla", "swa"], ["gla", "full"]],
        "sliding_window": 7,
        "gla": GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied),
        "num_sink_tokens": 3,
        "feed_forwards": ["dense", "moe"],
        "moe": MoEConfig(num_experts=4),
    }
    return ConversionConfig(**(settings | changes))


def convert(source: Path, output: Path, conversion: ConversionConfig) -> MegatronCheckpointReader:
    import_checkpoint(source, output, conversion)
    return MegatronCheckpointReader(output / "iter_0000000")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("gate", list(GateKind))
def test_the_table_knows_every_parameter_of_the_model_and_no_other(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, gate: GateKind
) -> None:
    """megatron-core fills a model of NaN from the checkpoint, and saves the same keys and values."""
    source, _ = hf_checkpoint(family)
    gla = GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=gate)
    written = convert(source, tmp_path / "out", recipe(gla=gla))
    (logits,) = ranks.run(
        logits_and_save, tmp_path / "out", tmp_path / "saved", world_size=1, parallel=ParallelConfig()
    )
    assert logits.isfinite().all()
    saved = MegatronCheckpointReader(tmp_path / "saved/iter_0000003")
    sizes = {name: tuple(entry.size) for name, entry in saved.tensors.items()}
    sizes["embedding.word_embeddings.weight"] = (101, 32)  # the model pads its vocabulary
    sizes["output_layer.weight"] = (101, 32)
    assert sizes == {name: tuple(entry.size) for name, entry in written.tensors.items()}
    for name in written.tensors:
        rows = 101 if "embedding.word" in name or "output_layer" in name else None
        assert torch.equal(saved.read(name)[:rows], written.read(name)), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_both_branches_start_from_the_sources_projections(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str
) -> None:
    source, _ = hf_checkpoint(family)
    dense = convert(source, tmp_path / "dense", ConversionConfig(mixers=["full"]))
    hybrid = convert(source, tmp_path / "hybrid", recipe())
    for layer in range(4):
        prefix = ATTENTION.format(layer=layer)
        parts = [name.removeprefix(prefix) for name in dense.tensors if name.startswith(prefix)]
        assert len(parts) == (3 if family == "qwen2" else 4)
        for part in parts:
            for branch in ("softmax_attention.", "linear_attention."):
                assert torch.equal(hybrid.read(prefix + branch + part), dense.read(prefix + part))
            assert prefix + part not in hybrid.tensors


def test_branches_are_weighed_and_normalised_to_the_sources_size(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint()
    weights = ParallelHybridConfig(init_softmax_weight=0.75, init_linear_weight=0.25)
    reader = convert(source, tmp_path / "out", recipe(parallel_hybrid=weights, seed=5))
    scale = scale_of(source, seed=5)
    for layer in range(4):
        prefix = ATTENTION.format(layer=layer)
        assert reader.read(prefix + "branch_weights").tolist() == [0.75, 0.25]
        expected = torch.full((32,), scale.of_layer(layer))
        assert torch.equal(reader.read(prefix + "softmax_norm.weight"), expected)
        assert torch.equal(reader.read(prefix + "linear_norm.weight"), expected)
    assert ConversionConfig().parallel_hybrid == ParallelHybridConfig(1.0, 0.0)  # the closest start


def test_a_tied_gate_has_no_parameters(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    reader = convert(source, tmp_path / "out", recipe())
    assert not [name for name in reader.tensors if "gate" in name]
    assert ATTENTION.format(layer=0) + "linear_attention.out_norm.weight" in reader.tensors
    assert not [name for name in reader.tensors if "softmax_attention.out_norm" in name]


def test_sinks_are_different_rows_of_the_embedding(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    sinks = convert(source, tmp_path / "out", recipe(num_sink_tokens=60)).read("sink_embedding.weight")
    rows = all_tensors(source)["model.embed_tokens.weight"]
    same = (sinks[:, None] == rows[None]).all(dim=-1)  # [60, 101]
    assert torch.equal(same.sum(dim=1), torch.ones(60, dtype=torch.long))
    assert same.sum(dim=0).max() == 1  # twins would stay twins in training
    other = convert(source, tmp_path / "other", recipe(num_sink_tokens=60, seed=7))
    assert not torch.equal(other.read("sink_embedding.weight"), sinks)


def test_more_sinks_than_rows_are_refused(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    with pytest.raises(ConfigurationError, match=r"num_sink_tokens=102 is more .* at most 101"):
        import_checkpoint(source, tmp_path / "out", recipe(num_sink_tokens=102))


def test_a_converted_checkpoint_gives_the_same_logits_on_two_pipeline_stages_with_experts_apart(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """Bound as in test_logits.py."""
    source, _ = hf_checkpoint("qwen2")
    convert(source, tmp_path / "out", recipe())
    (expected,) = ranks.run(megatron_logits, tmp_path / "out", world_size=1, parallel=ParallelConfig())
    parallel = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    results = ranks.run(megatron_logits, tmp_path / "out", world_size=4, parallel=parallel)
    last_stage = [logits for logits in results if logits is not None]
    assert len(last_stage) == 2
    for logits in last_stage:
        assert (logits - expected).abs().max() <= 2e-4


def test_report_counts_every_parameter_and_where_it_comes_from(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint()
    planned = import_checkpoint(source, tmp_path / "out", recipe(), dry_run=True)
    done = import_checkpoint(source, tmp_path / "out", recipe())
    assert planned.groups == done.groups
    reader = MegatronCheckpointReader(tmp_path / "out/iter_0000000")
    assert done.parameters == sum(entry.size.numel() for entry in reader.tensors.values())
    stored = (path.stat().st_size for path in (tmp_path / "out/iter_0000000").glob("*.distcp"))
    assert done.bytes == 4 * done.parameters < sum(stored)
    # Per layer two norms of 32, two branch weights and an output norm of 8; 3 sinks; two routers.
    assert done.new_parameters == 4 * (2 * 32 + 2 + 8) + 3 * 32 + 2 * 4 * 32
    origins = {group.name: group.origin for group in done.groups}
    assert origins["softmax branch q/k/v"] == origins["linear branch q/k/v"] == "copied"
    assert origins["branch weights (softmax, linear)"] == "new: 1 and 0"
    assert origins["branch norms"] == "new: size of the source's attention output, layer by layer"
    assert origins["sink tokens"].startswith("new: ")
    assert LAYERS in done.table()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"mixers": [["gla", "swa"], ["gla", "full"]]},
            r"layers with two branches \(\[gla,swa\], \[gla,full\]\)",
        ),
        ({"num_sink_tokens": 3}, "3 sink tokens"),
        ({"feed_forwards": ["dense", "moe"]}, "mixture-of-experts layers"),
        (
            {"gla": GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied)},
            "gla.gate=tied and gla.feature_map=sigmoid",
        ),
        ({"gla": GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid)}, "gla.feature_map=sigmoid"),
    ],
    ids=["parallel_hybrid", "sinks", "experts", "tied_gate", "sigmoid"],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    source, _ = hf_checkpoint()
    convert(source, tmp_path / "out", ConversionConfig(**changes))
    (tmp_path / "out/iter_0000000/__0_0.distcp").unlink()  # not even the weights are looked at
    with pytest.raises(CheckpointError, match=f"--format gla_swa cannot hold {part}; leave --format out"):
        export_checkpoint(tmp_path / "out", tmp_path / "hf", format_name="gla_swa")
    assert not (tmp_path / "hf").exists()


def test_spikes_are_left_out_of_an_export_to_a_format_without_them_with_a_note(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("qwen2")
    spiking = SpikingConfig(projections=[Projection.qkv])
    convert(source, tmp_path / "out", ConversionConfig(mixers=["full"], spiking=spiking))
    report = export_checkpoint(tmp_path / "out", tmp_path / "back", format_name="qwen2")
    assert any("computes without them" in note for note in report.notes)
    ours, theirs = all_tensors(tmp_path / "back"), all_tensors(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_inspect_shows_the_new_parts(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    spiking = SpikingConfig(projections=[Projection.qkv, Projection.mlp_fc2])
    convert(source, tmp_path / "out", recipe(spiking=spiking))
    text = inspect_checkpoint(tmp_path / "out").text(width=400)
    assert "GS GS* GS GF*" in text and "S swa, G gla, F full, * moe" in text
    assert "exports as SpikingBrainForCausalLM" in text
    assert LAYERS in text
    assert "extras:     3 sink tokens, spikes with k 3 in front of qkv, mlp_fc2" in text
