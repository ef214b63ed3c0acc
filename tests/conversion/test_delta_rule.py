"""How converted models begin with the gated delta rule: attention's projections, and starts of their own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import GatedDeltaRuleConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.megatron_models import megatron_logits
from tests.distributed.pool import RankPool

ATTENTION = "decoder.layers.0.self_attention."


def convert(source: Path, output: Path, gdn: GatedDeltaRuleConfig) -> MegatronCheckpointReader:
    import_checkpoint(source, output, ConversionConfig(mixers=["gdn", "swa"], gdn=gdn))
    return MegatronCheckpointReader(output / "iter_0000000")


def test_options_change_no_logit_at_the_start(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """To 1e-5 of the largest logit: silu(1.2785) is 1 up to rounding, and so are products in float32 of
    heads that read groups of their own or one together."""
    source, _ = hf_checkpoint("qwen2")
    starts = {"init_gate_std": 0.0, "init_half_life_min": 50.0, "init_half_life_max": 50.0}  # alike in groups
    options = {"output_gate": True, "num_query_groups": 4, "short_convolution": 4}
    logits = []
    for name, settings in (("plain", starts), ("options", {**starts, **options})):
        convert(source, tmp_path / name, GatedDeltaRuleConfig(**settings))
        logits += ranks.run(megatron_logits, tmp_path / name, world_size=1, parallel=ParallelConfig())
    assert logits[0].std() > 0.1
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    assert (logits[0] - logits[1]).square().mean().sqrt() <= 5e-6 * logits[0].std()


def test_new_weights_begin_as_the_page_says(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, model = hf_checkpoint("qwen3")
    gdn = GatedDeltaRuleConfig(short_convolution=3, init_half_life_min=4, init_half_life_max=400)
    reader = convert(source, tmp_path / "out", gdn)
    of_layer = {
        name.removeprefix(ATTENTION): reader.read(name) for name in reader.tensors if ATTENTION in name
    }
    attention = model.model.layers[0].self_attn
    assert torch.equal(of_layer["linear_proj.weight"], attention.o_proj.weight)
    assert torch.equal(of_layer["q_layernorm.weight"], attention.q_norm.weight)
    groups, width = len(of_layer["A_log"]), attention.head_dim
    key = of_layer["linear_qkv.weight"].unflatten(0, (groups, -1, width))[:, -2].flatten(0, 1)
    assert torch.equal(key, attention.k_proj.weight)

    log_gate = -of_layer["A_log"].exp() * torch.nn.functional.softplus(of_layer["dt_bias"])
    half_lives = torch.logspace(math.log10(4), math.log10(400), groups)
    torch.testing.assert_close(log_gate, -math.log(2) / half_lives, rtol=1e-5, atol=0)
    channels = len(of_layer["linear_qkv.weight"])
    assert torch.equal(of_layer["conv1d.weight"], torch.tensor([0.0, 0.0, 1.0]).expand(channels, 3))
    for name in ("linear_decay.weight", "linear_beta.weight"):
        assert of_layer[name].shape == (groups, 32) and 0.01 < of_layer[name].std() < 0.03
    assert (of_layer["out_norm.weight"] == 0.3).all()


def test_what_does_not_fit_is_refused(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    wrong = {
        r"model\.gdn\.num_query_groups=3 does not fit 4 heads in 2 groups.*valid are 2 or 4": {
            "num_query_groups": 3
        },
        "gdn.short_convolution=1 would read the token alone; set it to 0 for none": {"short_convolution": 1},
        "gdn.init_half_life_min=9 is above gdn.init_half_life_max=3; swap them": {
            "init_half_life_min": 9.0,
            "init_half_life_max": 3.0,
        },
    }
    for sentence, settings in wrong.items():
        with pytest.raises(ConfigurationError, match=sentence):
            convert(source, tmp_path / "out", GatedDeltaRuleConfig(**settings))
