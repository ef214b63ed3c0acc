"""Two checkpoints side by side: what differs is named with how far it is, and it ends as diff does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.command_line import convert_checkpoint
from spikingbrain_train.conversion.difference import Distance, Verdict, diff_checkpoints
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.reshard import reshard_checkpoint
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from tests.conversion.hf_models import HFCheckpoint

OLD = Path(__file__).parents[1] / "old_checkpoints" / "76b"
Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


def changed(source: Path, target: Path) -> Path:
    """A copy in which one number of one tensor moved by 0.5 and another tensor doubled."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_bytes((source / name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[Q][3, 4] += 0.5
    tensors[NORM] = 2 * tensors[NORM]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_megatron_and_hugging_face_in_every_pairing(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("qwen2")
    other = changed(source, tmp_path / "changed")
    import_checkpoint(source, tmp_path / "megatron")
    import_checkpoint(other, tmp_path / "megatron_changed")
    a, b = load_file(source / "model.safetensors"), load_file(other / "model.safetensors")
    for first in (source, tmp_path / "megatron"):
        same = diff_checkpoints(first, source)
        assert not same.differ and len(same.tensors) == same.count(Verdict.equal) == len(a)
        found = diff_checkpoints(first, other)
        worst, second, *rest = found.tensors
        assert (worst.name, second.name) == (NORM, Q) and found.count(Verdict.differs) == 2
        assert worst.relative == pytest.approx(1.0) and {each.verdict for each in rest} == {Verdict.equal}
        assert second.largest == pytest.approx(0.5)
        assert second.relative == pytest.approx(float((b[Q] - a[Q]).norm() / a[Q].norm()), rel=1e-5)
    both = diff_checkpoints(tmp_path / "megatron", tmp_path / "megatron_changed")
    assert [each.name for each in both.tensors[:2]] == [
        "decoder.final_layernorm.weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
    ]


def test_a_hybrid_and_its_export_are_the_same(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """With all that an export repeats for readers of its format: biases of zeros, a copied output layer."""
    source, _ = hf_checkpoint("llama", tie_word_embeddings=True)
    import_checkpoint(source, tmp_path / "hybrid", ConversionConfig(mixers=["gla", "swa"], sliding_window=7))
    export_checkpoint(tmp_path / "hybrid", tmp_path / "export")
    assert not diff_checkpoints(tmp_path / "hybrid", tmp_path / "export").differ
    dense = diff_checkpoints(tmp_path / "hybrid", source)
    assert dense.differ and "mixers" in dense.settings and dense.count(Verdict.only_a) > 0
    assert dense.count(Verdict.equal) == len(load_file(source / "model.safetensors"))


def test_padding_of_the_vocabulary_does_not_count(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("qwen2")
    import_checkpoint(source, tmp_path / "megatron")
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    reshard_checkpoint(tmp_path / "megatron", tmp_path / "two", parallel)
    reader = MegatronCheckpointReader(latest_checkpoint(tmp_path / "two", "two"))
    embedding = reader.read("embedding.word_embeddings.weight")
    rows = load_file(source / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert len(embedding) == 256 > rows and not embedding[rows:].any()
    assert not diff_checkpoints(tmp_path / "megatron", tmp_path / "two").differ
    assert not diff_checkpoints(tmp_path / "two", source).differ


def test_the_layout_does_not_count(tmp_path: Path) -> None:
    for name, stages in (("one", 1), ("two", 2)):
        parallel = ParallelConfig(pipeline_model_parallel_size=stages)
        reshard_checkpoint(OLD, tmp_path / name, parallel, weights_only=stages == 2)
    found = diff_checkpoints(OLD, tmp_path / "one", with_training=True)
    assert not found.differ and any(each.name.startswith("optimizer.") for each in found.tensors)
    found = diff_checkpoints(OLD, tmp_path / "two")
    assert not found.differ and "--training" in found.text(20)
    assert diff_checkpoints(OLD, tmp_path / "two", with_training=True).count(Verdict.only_a) > 0


def test_number_formats(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, model = hf_checkpoint("qwen3")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    found = diff_checkpoints(source, tmp_path / "bf16")
    assert found.count(Verdict.differs) == len(found.tensors)
    assert not diff_checkpoints(source, tmp_path / "bf16", tolerance=2**-8).differ
    assert "float32 | bfloat16" in found.text(1) and "--top 0" in found.text(1)


def test_distances_of_numbers_that_are_not_finite() -> None:
    nan, inf = math.nan, math.inf
    found = Distance()
    found.add(torch.tensor([nan, inf, 1.0, nan, inf, 0.0]), torch.tensor([nan, inf, 1.5, 1.0, -inf, 0.0]))
    assert (found.largest, found.relative, found.not_finite) == (0.5, 0.5, 2)
    zeros = Distance()
    zeros.add(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert zeros.relative == inf


def test_it_ends_as_diff_does(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = hf_checkpoint("qwen2")
    other = changed(source, tmp_path / "changed")
    convert_checkpoint(["diff", str(source), str(source)])
    assert "equal" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        convert_checkpoint(["diff", str(source), str(other), "--json"])
    assert ended.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert (
        told["differ"] and told["tensors"][0]["name"] == NORM and told["tensors"][0]["verdict"] == "differs"
    )
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(SystemExit) as ended:
        convert_checkpoint(["diff", str(source), str(other)])
    assert ended.value.code == 2
    assert "changed/model.safetensors is not a complete safetensors file" in capsys.readouterr().err
