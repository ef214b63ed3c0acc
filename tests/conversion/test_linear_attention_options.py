"""How converted models begin with options of linear attention: as they would without, where they can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import GatedLinearAttentionConfig, GateKind
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.megatron_models import megatron_logits
from tests.distributed.pool import RankPool

ATTENTION = "decoder.layers.{layer}.self_attention."


def convert(source: Path, output: Path, gla: GatedLinearAttentionConfig) -> MegatronCheckpointReader:
    import_checkpoint(source, output, ConversionConfig(mixers=["gla", "swa"], gla=gla))
    return MegatronCheckpointReader(output / "iter_0000000")


def test_an_output_gate_and_copied_groups_change_no_logit_at_the_start(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """To 1e-5 of float32 logits of order 1: swish(1.2785) is 1 up to rounding."""
    source, _ = hf_checkpoint("qwen2")
    plain = GatedLinearAttentionConfig(init_gate_std=0.0)  # else new groups would have gates of their own
    with_options = replace(plain, output_gate=True, num_query_groups=4)
    logits = []
    for name, gla in (("plain", plain), ("options", with_options)):
        convert(source, tmp_path / name, gla)
        logits += ranks.run(megatron_logits, tmp_path / name, world_size=1, parallel=ParallelConfig())
    assert logits[0].std() > 0.1
    assert (logits[0] - logits[1]).abs().max() <= 1e-5


def test_fixed_decays_begin_as_the_slopes_of_minimax(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """To 1e-3 of a layer's first slope: transformers adds the small term elsewhere than the authors."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    configuration = pytest.importorskip("transformers.models.minimax.configuration_minimax")
    source, _ = hf_checkpoint("llama")
    gla = GatedLinearAttentionConfig(gate=GateKind.fixed, num_query_groups=4)
    reader = convert(source, tmp_path / "out", gla)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 4}
    config = configuration.MiniMaxConfig(**sizes)
    for layer in (0, 2):
        slopes = minimax.MiniMaxLightningAttention(config, layer).get_slope_rate().flatten()
        found = reader.read(ATTENTION.format(layer=layer) + "log_decay")
        assert torch.allclose(found, -slopes, rtol=0, atol=1e-3 * slopes[0].item())
        assert not any("gate_" in name for name in reader.tensors)


def test_channels_that_turn_together_begin_to_forget_together(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("llama")
    reader = convert(source, tmp_path / "out", GatedLinearAttentionConfig(rotary=True))
    bias = reader.read(ATTENTION.format(layer=0) + "linear_gate_up_proj.bias")
    # 2 groups of 2 halves of 4 pairs, to float32 rounding.
    assert torch.allclose(bias, torch.linspace(-16.0, 4.0, 4).repeat(4), rtol=0, atol=2e-6)


def test_norms_of_q_and_k_begin_at_one_where_the_source_has_none(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    gla = GatedLinearAttentionConfig(qk_norm=True)
    for family in ("llama", "qwen3"):
        source, model = hf_checkpoint(family)
        reader = convert(source, tmp_path / family, gla)
        norm = reader.read(ATTENTION.format(layer=0) + "q_layernorm.weight")
        has_its_own = family == "qwen3"
        of_the_source = model.model.layers[0].self_attn.q_norm.weight if has_its_own else torch.ones(8)
        assert torch.equal(norm, of_the_source)
        assert (ATTENTION.format(layer=1) + "q_layernorm.weight" in reader.tensors) is has_its_own


def test_groups_that_cannot_be_copied_are_refused(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    sentence = r"model\.gla\.num_query_groups=3 does not fit 4 heads in 2 groups.*valid are 2 or 4"
    with pytest.raises(ConfigurationError, match=sentence):
        convert(source, tmp_path / "out", GatedLinearAttentionConfig(num_query_groups=3))
