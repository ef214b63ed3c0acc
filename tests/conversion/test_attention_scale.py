"""The estimated size of attention outputs, against transformers on the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.conversion.attention_scale import AttentionScale
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.conversion.source import Source
from tests.conversion.hf_models import HFCheckpoint


def scale_of(folder: Path, seed: int = 0) -> AttentionScale:
    source = Source(SafetensorsReader(folder), *read_hf_config(folder), allow_damaged_weights=True)
    return AttentionScale(source, seed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_are_those_of_transformers_on_the_same_tokens(hf_checkpoint: HFCheckpoint, family: str) -> None:
    """1e-5 relative: float32 sums in another order."""
    folder, _ = hf_checkpoint(family)
    scale = scale_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = {}

    def record(layer: int):  # type: ignore[no-untyped-def]
        def hook(module: object, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            expected[layer] = output[0].square().mean(-1).sqrt().log().mean().exp().item()

        return hook

    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(record(layer))
    with torch.no_grad():
        model(scale._tokens())
    assert len(expected) == 4
    sizes = sorted(expected.values())
    assert all(b / a > 1.001 for a, b in zip(sizes, sizes[1:], strict=False))  # a mix-up would show
    for layer in (2, 0, 3, 1):  # in whatever order they are asked for
        assert scale.of_layer(layer) == pytest.approx(expected[layer], rel=1e-5)


def test_tokens_follow_the_seed_and_prefer_small_ids(hf_checkpoint: HFCheckpoint) -> None:
    folder, _ = hf_checkpoint(vocab_size=5000)
    first, again, other = (scale_of(folder, seed)._tokens() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() < 5000
    assert first.float().median() < 1500  # 900 in expectation; equal probabilities would give 2500


def test_an_attention_that_gives_nothing_is_no_error(hf_checkpoint: HFCheckpoint) -> None:
    """Pruned layers exist; their size is 0, not a NaN that spreads."""
    folder, model = hf_checkpoint()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(folder)
    scale = scale_of(folder)
    assert scale.of_layer(1) < 1e-30
    assert scale.of_layer(2) > 1e-3
