"""How converted models begin with Mamba: what of attention their weights hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.mamba import MambaConfig, MambaStart
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from tests.conversion.hf_models import HFCheckpoint

MIXER = "decoder.layers.0.self_attention."


def weights(source: Path, output: Path, mamba: MambaConfig) -> dict[str, torch.Tensor]:
    """Of the first layer's mixer."""
    import_checkpoint(source, output, ConversionConfig(mixers=["mamba", "swa"], mamba=mamba))
    reader = MegatronCheckpointReader(output / "iter_0000000")
    names = [name for name in reader.tensors if name.startswith(MIXER)]
    return {name.removeprefix(MIXER): reader.read(name).float() for name in names}


def sizes(model: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and their width."""
    config = model.config
    return (
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_layer_whose_states_are_empty_gives_the_values_through_the_output_projection(
    family: str, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """Of pairs of channels to rounding (1e-5 of the largest): silu(v) - silu(-v) = v, D = 1, an open gate."""
    source, model = hf_checkpoint(family)
    attention, (heads, groups, width) = model.model.layers[0].self_attn, sizes(model)
    mamba = MambaConfig(intermediate_size=2 * heads * width, use_bias=True, init_output_scale=0.5)
    of = weights(source, tmp_path / "out", mamba)
    u = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x, z = (u @ of["in_proj.weight"].t() + of["in_proj.bias"]).unflatten(-1, (-1, 2)).unbind(-1)
        assert of["conv1d.weight"].flatten(1)[:, :-1].abs().max() == 0
        x = torch.nn.functional.silu(x * of["conv1d.weight"][:, 0, -1]) * of["D"]
        gate = torch.nn.functional.silu(of["in_proj.bias"].view(-1, 2)[:, 1])
        found = (x * gate) @ of["out_proj.weight"].t() + of["out_proj.bias"]
        values = attention.v_proj(u).unflatten(-1, (groups, width)).repeat_interleave(heads // groups, 1)
        expected = 0.5 * values.flatten(1) @ attention.o_proj.weight.t()
    assert z.std() > 0  # the gate learns
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_state_for_every_value_scores_as_the_mean_of_heads(
    family: str, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """Where the values tell all of a token, B C^T is the mean of q k^T: to 1e-3, the ridge of the fit."""
    source, model = hf_checkpoint(family)
    attention, (heads, groups, width) = model.model.layers[0].self_attn, sizes(model)
    mamba = MambaConfig(intermediate_size=2 * heads * width, state_size=groups * width)
    of = weights(source, tmp_path / "out", mamba)
    rows, norm = of["in_proj.weight"][0::2], model.model.layers[0].input_layernorm.weight
    value = attention.v_proj.weight * norm
    with torch.no_grad():
        # Inputs that the values span: nothing of a token is lost in them.
        u = torch.randn(30, groups * width, generator=torch.Generator().manual_seed(1)) @ value
        x = torch.nn.functional.silu((u * norm) @ rows.t())
        _, B, C = (x @ of["x_proj.weight"].t()).split(
            [len(of["x_proj.weight"]) - 2 * groups * width, *2 * (groups * width,)], dim=-1
        )
        q, k = attention.q_proj.weight * norm, attention.k_proj.weight * norm
        if family == "qwen3":
            q, k = (
                each.unflatten(0, (-1, width))
                / each.unflatten(0, (-1, width)).square().sum(-1).mean(1).sqrt()[:, None, None]
                * weight[:, None]
                for each, weight in ((q, attention.q_norm.weight), (k, attention.k_norm.weight))
            )
        q, k = (u @ each.reshape(-1, u.shape[1]).t() for each in (q, k))
        q, k = q.unflatten(-1, (heads, width)), k.unflatten(-1, (groups, width))
        k = k.repeat_interleave(heads // groups, 1)
        scores = torch.einsum("thd,shd->ts", q, k) * width**-0.5 / heads
    assert (C @ B.t() - scores).abs().max() <= 1e-3 * scores.abs().max()


def test_steps_span_the_whole_range_in_every_head(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, model = hf_checkpoint("llama")
    heads, _, width = sizes(model)
    of = weights(source, tmp_path / "out", MambaConfig(intermediate_size=2 * heads * width))
    steps = torch.nn.functional.softplus(of["dt_proj.bias"]).view(heads, width, 2)
    torch.testing.assert_close(steps[..., 0], steps[..., 1])
    torch.testing.assert_close(
        steps[:, :, 0], torch.logspace(-3, -1, width).expand(heads, width), rtol=1e-4, atol=0
    )


def test_random_starts_hold_nothing_of_the_source(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, model = hf_checkpoint("llama")
    of = weights(source, tmp_path / "out", MambaConfig(intermediate_size=24, init=MambaStart.random))
    assert of["conv1d.weight"].flatten(1)[:, :-1].std() > 0
    assert of["in_proj.weight"].std() == pytest.approx(0.02, rel=0.2)


def test_channels_that_do_not_fit_the_heads_are_one_sentence(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, model = hf_checkpoint("llama")
    heads, _, width = sizes(model)
    for channels in (heads * width + 8, 3 * heads * width):
        with pytest.raises(
            ConfigurationError, match=f"intermediate_size={channels} does not allow; set it to"
        ):
            weights(source, tmp_path / "out", MambaConfig(intermediate_size=channels))
