"""Experts as copies of the dense feed-forward: scales, re-initialisation, the exact form, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig, UpcyclingForm
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from tests.conversion.hf_models import SIZES, HFCheckpoint, all_tensors
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed.pool import RankPool

PUBLISHED = UpcyclingForm.published
EXACT = UpcyclingForm.exact
MLP = "decoder.layers.1.mlp."
WIDTH = SIZES["intermediate_size"]


def recipe(form: UpcyclingForm = PUBLISHED, fraction: float = 0.0, **moe: Any) -> ConversionConfig:
    """Full attention, a dense layer and a mixture of 4 experts in turns."""
    return ConversionConfig(
        mixers=["full"],
        feed_forwards=["dense", "moe"],
        moe=MoEConfig(**{"num_experts": 4, **moe}),
        upcycling=UpcyclingConfig(form=form, reinit_fraction=fraction),
    )


def convert(source: Path, output: Path, conversion: ConversionConfig) -> MegatronCheckpointReader:
    import_checkpoint(source, output, conversion)
    return MegatronCheckpointReader(output / "iter_0000000")


def dense_parts(source: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = all_tensors(source)
    gate, up, down = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return gate, up, down


def experts(reader: MegatronCheckpointReader) -> tuple[torch.Tensor, torch.Tensor]:
    """fc1 [experts, 2 * width, hidden] and fc2 [experts, hidden, width] of layer 1."""
    fc1, fc2 = (reader.read(f"{MLP}experts.experts.linear_fc{number}.weight") for number in (1, 2))
    return fc1, fc2


def test_published_form_scales_all_matrices_of_every_expert(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """alpha = (S + k/N)^(-1/3), 0.98 as published for S=1, k=1, N=16; scaled in float32, rounded once."""
    source, _ = hf_checkpoint(dtype=torch.bfloat16)
    reader = convert(source, tmp_path / "out", recipe(num_experts=16))
    alpha = (1 + 1 / 16) ** (-1 / 3)
    assert round(alpha, 2) == 0.98
    gate, up, down = ((alpha * part.float()).bfloat16() for part in dense_parts(source))
    fc1, fc2 = experts(reader)
    assert (fc1.shape, fc2.shape) == ((16, 2 * WIDTH, 32), (16, 32, WIDTH))
    for expert in range(16):
        assert torch.equal(fc1[expert], torch.cat([gate, up]))
        assert torch.equal(fc2[expert], down)
    assert torch.equal(reader.read(f"{MLP}shared_experts.linear_fc1.weight"), torch.cat([gate, up]))
    assert torch.equal(reader.read(f"{MLP}shared_experts.linear_fc2.weight"), down)
    assert f"{MLP}linear_fc1.weight" not in reader.tensors
    assert "decoder.layers.0.mlp.linear_fc1.weight" in reader.tensors


def test_router_of_the_published_form_is_random(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(hidden_size=256)
    conversion = recipe(num_experts=64)
    conversion.upcycling.router_init_std = 0.05
    router = convert(source, tmp_path / "out", conversion).read(MLP + "router.weight")
    assert router.shape == (64, 256)
    assert abs(router.std().item() - 0.05) < 0.002  # 16384 samples: 5 standard errors are 0.0014


def test_several_shared_experts_stand_side_by_side(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """One SwiGLU of three times the width computes three times the (scaled) dense feed-forward."""
    source, _ = hf_checkpoint()
    reader = convert(source, tmp_path / "out", recipe(EXACT, num_shared_experts=3))
    fc1 = reader.read(f"{MLP}shared_experts.linear_fc1.weight").double()
    fc2 = reader.read(f"{MLP}shared_experts.linear_fc2.weight").double()
    assert (fc1.shape, fc2.shape) == ((6 * WIDTH, 32), (32, 3 * WIDTH))
    gate, up, down = (part.double() for part in dense_parts(source))
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = (silu(x @ fc1[: 3 * WIDTH].T) * (x @ fc1[3 * WIDTH :].T)) @ fc2.T
    dense = (silu(x @ gate.T) * (x @ up.T)) @ down.T
    # The weights were rounded to float32 after scaling: 2^-24 each, a few times that after the sums.
    assert torch.allclose(wide, 3 * dense / (3 + 1 / 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("shared", "topk", "number"), [(1, 1, 16), (0, 2, 4), (2, 2, 4)], ids=["76B", "routed", "two_of_each"]
)
def test_exact_form_computes_what_transformers_computes_from_the_dense_source(
    ranks: RankPool,
    hf_checkpoint: HFCheckpoint,
    tmp_path: Path,
    family: str,
    shared: int,
    topk: int,
    number: int,
) -> None:
    """Bound 1e-4 on logits of order 1-10: tie-breaking noise and float32 sums stay below 2e-5."""
    source, _ = hf_checkpoint(family)
    conversion = recipe(EXACT, num_shared_experts=shared, router_topk=topk, num_experts=number)
    convert(source, tmp_path / "out", conversion)
    (logits,) = ranks.run(megatron_logits, tmp_path / "out", world_size=1, parallel=ParallelConfig())
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dense(TOKENS).logits
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= 1e-4


def test_exact_form_spreads_tokens_over_experts(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """A router of zeros would tie and send every token to one expert."""
    source, _ = hf_checkpoint()
    router = convert(source, tmp_path / "out", recipe(EXACT)).read(MLP + "router.weight")
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    probabilities = torch.softmax(x @ router.T, dim=-1)
    load = torch.bincount(probabilities.argmax(dim=-1), minlength=4)
    assert load.min() > 20
    assert (probabilities - 0.25).abs().max() < 1e-5


def test_redrawn_channels_are_the_same_in_all_matrices_of_an_expert_and_others_elsewhere(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint()
    plain = experts(convert(source, tmp_path / "plain", recipe()))
    drawn = experts(convert(source, tmp_path / "drawn", recipe(fraction=0.25)))
    chosen = []
    for expert in range(4):
        changed_fc1 = (plain[0][expert] != drawn[0][expert]).view(2, WIDTH, 32)
        changed_fc2 = plain[1][expert] != drawn[1][expert]
        channels = changed_fc2.any(dim=0)
        assert channels.sum() == WIDTH // 4
        for matrix in (changed_fc1[0], changed_fc1[1], changed_fc2.T):
            assert torch.equal(matrix.all(dim=1), channels)
            assert torch.equal(matrix.any(dim=1), channels)
        chosen.append(tuple(channels.nonzero().flatten().tolist()))
    assert len(set(chosen)) == 4


def test_redrawn_values_have_the_statistics_of_what_they_replace(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(hidden_size=128, intermediate_size=512)
    fc1, fc2 = experts(convert(source, tmp_path / "out", recipe(fraction=1.0)))
    alpha = (1 + 1 / 4) ** (-1 / 3)
    for ours, theirs in zip((fc1[0, :512], fc1[0, 512:], fc2[0]), dense_parts(source), strict=True):
        # 65536 samples: 5 standard errors of the mean are 0.02 of the deviation, of the deviation 0.014.
        assert abs(ours.mean() - alpha * theirs.mean()) < 0.02 * alpha * theirs.std()
        assert abs(ours.std() / (alpha * theirs.std()) - 1) < 0.015
        assert not torch.isclose(ours, alpha * theirs).any(dim=0).all()


def test_redrawing_follows_the_seed(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    conversion = recipe(fraction=0.5)
    first = experts(convert(source, tmp_path / "first", conversion))
    again = experts(convert(source, tmp_path / "again", conversion))
    conversion.seed += 1
    other = experts(convert(source, tmp_path / "other", conversion))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_exact_form_with_redrawn_channels_says_that_it_is_not_exact(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint()
    report = import_checkpoint(source, tmp_path / "out", recipe(EXACT, 0.5), dry_run=True)
    assert any("near the dense function, not at it" in note for note in report.notes)


def test_experts_of_another_width_are_refused(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    with pytest.raises(ConfigurationError, match=r"moe_ffn_hidden_size=12 differs .* set it to 48 or null"):
        import_checkpoint(source, tmp_path / "out", recipe(moe_ffn_hidden_size=12))
    assert not (tmp_path / "out").exists()
    import_checkpoint(source, tmp_path / "out", recipe(moe_ffn_hidden_size=WIDTH), dry_run=True)


def test_report_names_scales_and_counts_copies_as_copies(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    report = import_checkpoint(source, tmp_path / "out", recipe(num_experts=16), dry_run=True)
    origins = {(group.name, group.origin): group for group in report.groups}
    feed_forward = 3 * WIDTH * 32
    routed = origins["routed experts", "copied and scaled by 0.98"]
    assert (routed.tensors, routed.parameters) == (4, 2 * 16 * feed_forward)
    assert origins["shared experts", "copied and scaled by 0.98"].parameters == 2 * feed_forward
    assert origins["feed-forward", "copied"].parameters == 2 * feed_forward
    assert origins["router", "new: normal, std 0.02"].parameters == 2 * 16 * 32
    assert report.new_parameters == 2 * 16 * 32  # the router alone
    assert "2 dense + 2 moe (16 experts, top-1, + 1 shared of width 48)" in report.table()


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(expert_model_parallel_size=2),
        ParallelConfig(expert_model_parallel_size=4),
        ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1),
        ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    ],
    ids=["EP2", "EP4", "TP2_ETP1", "TP2_ETP2", "PP2", "PP2_EP2"],
)
def test_an_upcycled_checkpoint_loads_at_any_topology(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, parallel: ParallelConfig
) -> None:
    """Logits of one rank, with experts that differ; bound as in test_logits.py."""
    source, _ = hf_checkpoint()
    convert(source, tmp_path / "out", recipe(fraction=0.5))
    (expected,) = ranks.run(megatron_logits, tmp_path / "out", world_size=1, parallel=ParallelConfig())
    ranks_of_a_stage = max(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size)
    world_size = ranks_of_a_stage * parallel.pipeline_model_parallel_size
    results = ranks.run(megatron_logits, tmp_path / "out", world_size=world_size, parallel=parallel)
    last_stage = [logits for logits in results if logits is not None]
    assert len(last_stage) == ranks_of_a_stage
    assert expected.std() > 0.1
    for logits in last_stage:
        assert (logits - expected).abs().max() <= 2e-4
