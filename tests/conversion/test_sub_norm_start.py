"""Sub-norms for a dense source: where they begin, against transformers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.conversion.test_attention_scale import scale_of
from tests.distributed.pool import RankPool

RECIPE = ConversionConfig(mixers=["full"], attn_sub_norm=True, ffn_sub_norm=True)
ONE = ParallelConfig()


def norms(folder: Path) -> dict[str, torch.Tensor]:
    reader = MegatronCheckpointReader(latest_checkpoint(folder, "folder"))
    return {name: reader.read(name) for name in reader.tensors if "sub_norm" in name}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_they_begin_at_what_projections_of_transformers_read(
    hf_checkpoint: HFCheckpoint, family: str, tmp_path: Path
) -> None:
    """1e-5 relative: float32 sums in another order."""
    folder, _ = hf_checkpoint(family)
    import_checkpoint(folder, tmp_path / "megatron", RECIPE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = {}

    def record(name: str) -> Callable[[object, tuple[torch.Tensor]], None]:
        def hook(module: object, inputs: tuple[torch.Tensor]) -> None:
            x_TC = inputs[0].double().flatten(0, 1)
            size = (x_TC.square().mean(-1) + model.config.rms_norm_eps).sqrt()
            expected[name] = size.log().mean().exp().expand(x_TC.shape[1])

        return hook

    for layer, block in enumerate(model.model.layers):
        parts = {"self_attention.linear_proj": block.self_attn.o_proj, "mlp.linear_fc2": block.mlp.down_proj}
        for name, linear in parts.items():
            whole = f"decoder.layers.{layer}.{name}.sub_norm.weight"
            linear.register_forward_pre_hook(record(whole))
    with torch.no_grad():
        model(scale_of(folder, RECIPE.seed)._tokens())
    found = norms(tmp_path / "megatron")
    assert found.keys() == expected.keys() and len(found) == 2 * len(model.model.layers)
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=0)


def test_they_change_the_function_less_than_ones_do(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    folder, source = hf_checkpoint()
    report = import_checkpoint(folder, tmp_path / "megatron", RECIPE)
    assert any("norms begin at the size of what its projections read" in note for note in report.notes)
    with torch.no_grad():
        expected = source.float()(TOKENS).logits
    (found,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE)
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    # Of transformers' own class with sub-norms, BitNetForCausalLM.
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (exported(TOKENS).logits - found).abs().max() <= 2e-4
        for name, parameter in exported.named_parameters():
            if "sub_norm" in name:
                parameter.fill_(1.0)
        ones = exported(TOKENS).logits
    assert (found - expected).square().mean() < (ones - expected).square().mean()


@pytest.mark.parametrize("size", [2])
def test_tensor_parallel_ranks_read_what_one_does(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, size: int
) -> None:
    folder, _ = hf_checkpoint()
    import_checkpoint(folder, tmp_path / "megatron", RECIPE)
    (one,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE)
    parallel = ParallelConfig(tensor_model_parallel_size=size)
    several = ranks.run(megatron_logits, tmp_path / "megatron", world_size=size, parallel=parallel)
    assert all((each - one).abs().max() <= 1e-5 * one.abs().max() for each in several)


@pytest.mark.parametrize(
    "parallel",
    [ONE, ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(pipeline_model_parallel_size=2)],
    ids=["one rank", "TP 2", "PP 2"],
)
def test_norms_that_have_not_come_in_yet_leave_the_source_bit_for_bit(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, parallel: ParallelConfig
) -> None:
    """What `stage.sub_norm_annealing` begins with, and what it ends with."""
    folder, _ = hf_checkpoint()
    import_checkpoint(folder, tmp_path / "dense", ConversionConfig(mixers=["full"]))
    import_checkpoint(folder, tmp_path / "megatron", RECIPE)

    def logits(name: str, share: float | None) -> torch.Tensor:
        where: dict[str, Any] = {"world_size": parallel.model_parallel_size, "parallel": parallel}
        found: torch.Tensor = ranks.run(megatron_logits, tmp_path / name, share, **where)[-1]
        return found

    dense, whole = logits("dense", None), logits("megatron", None)
    assert torch.equal(logits("megatron", 0.0), dense) and torch.equal(logits("megatron", 1.0), whole)
    half = logits("megatron", 0.5)
    assert all((half - other).abs().max() > 1e-2 for other in (dense, whole))


def test_one_of_them_alone_under_new_mixers(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    folder, _ = hf_checkpoint()
    recipe = replace(RECIPE, mixers=["gla", "swa"], sliding_window=7, ffn_sub_norm=None)
    import_checkpoint(folder, tmp_path / "megatron", recipe)
    assert {name.rpartition(".sub_norm")[0].rpartition(".")[2] for name in norms(tmp_path / "megatron")} == {
        "linear_proj"
    }
    model = load_model_config(latest_checkpoint(tmp_path / "megatron", "folder") / MODEL_CONFIG_FILE)
    assert model.attn_sub_norm and not model.ffn_sub_norm


def test_norms_stay_where_a_source_has_them_and_experts_get_none(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    folder, _ = hf_checkpoint()
    import_checkpoint(folder, tmp_path / "megatron", RECIPE)
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    kept = ConversionConfig(keep_mixers=True)
    import_checkpoint(tmp_path / "export", tmp_path / "again", kept)
    before, after = norms(tmp_path / "megatron"), norms(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigurationError, match="ffn_sub_norm=false would take norms out of"):
        import_checkpoint(tmp_path / "export", tmp_path / "x", replace(kept, ffn_sub_norm=False))
    experts = replace(RECIPE, feed_forwards=["moe"], moe=MoEConfig(num_experts=2))
    with pytest.raises(ConfigurationError, match="experts have no norms"):
        import_checkpoint(folder, tmp_path / "x", experts)
