"""Rotary positions of slices, and their scaling against transformers' own, in training and in exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spikingbrain_train.architecture.rotary import attention_factor
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.conversion.formats.rope import scaling_values
from spikingbrain_train.hf.rotary_gla_swa import RotaryPositions as HFRotaryPositions
from spikingbrain_train.models.rotary import RotaryPositions
from spikingbrain_train.ops.rotary import scaled_frequencies
from tests.parallel.context_parallel.test_sequence_layout import layouts

LLAMA3 = RopeScalingConfig(RopeType.llama3, 8.0, 8192)
KINDS = {
    "linear": RopeScalingConfig(RopeType.linear, 4.0),
    "dynamic": RopeScalingConfig(RopeType.dynamic, 2.0, 4096),
    "dynamic of factor 1": RopeScalingConfig(RopeType.dynamic, 1.0, 4096),
    "yarn of Qwen2.5": RopeScalingConfig(RopeType.yarn, 4.0, 32768),
    "yarn of other betas": RopeScalingConfig(RopeType.yarn, 16.0, 4096, beta_fast=20.0, beta_slow=2.0),
    "yarn, not truncated": RopeScalingConfig(RopeType.yarn, 4.0, 4096, truncate=False),
    "yarn of given magnitude": RopeScalingConfig(RopeType.yarn, 4.0, 4096, attention_factor=1.3),
    "Llama 3.1": LLAMA3,
    "Llama 3.2": RopeScalingConfig(RopeType.llama3, 32.0, 4096),
    "other ramp": RopeScalingConfig(RopeType.llama3, 4.0, low_freq_factor=2.0, high_freq_factor=16.0),
    "longrope": RopeScalingConfig(
        *(RopeType.longrope, 8.0, 4096),
        short_factor=[1.0 + 0.01 * i for i in range(64)],
        long_factor=[1.0 + 0.5 * i for i in range(64)],
    ),
}


@pytest.mark.parametrize("text_length", [100, 4096, 4097, 20000])
@pytest.mark.parametrize("name", KINDS)
def test_scaled_frequencies_are_those_of_transformers(name: str, text_length: int) -> None:
    scaling, base = KINDS[name], 500000.0
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=scaling.original_max_position_embeddings,
        rope_parameters={**(scaling_values(scaling) or {}), "rope_theta": base},
    )
    transformers = ROPE_INIT_FUNCTIONS[scaling.rope_type.value]
    expected, factor = transformers(config, torch.device("cpu"), seq_len=text_length)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    inv_freq = base ** (-torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    scaled = scaled_frequencies(inv_freq, base, scaling, text_length)
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)  # float32 rounding
    ours = HFRotaryPositions(128, base, scaling_values(scaling), scaling.original_max_position_embeddings)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
    exported = ours.frequencies(torch.device("cpu"), torch.tensor([[text_length]])).flatten()
    torch.testing.assert_close(exported, expected, rtol=1e-6, atol=0)


def test_llama3_leaves_the_fastest_alone_and_scales_the_slowest_in_full() -> None:
    inv_freq = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    scaled = scaled_frequencies(inv_freq, 500000.0, LLAMA3)
    assert (scaled[:4] == inv_freq[:4]).all()
    torch.testing.assert_close(scaled[-1], inv_freq[-1] / LLAMA3.factor)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_every_document_is_turned_by_its_own_whole_length(name: str) -> None:
    """Packed, and split over ranks, as on its own; a token that is read alone by the length up to it."""
    scaling = replace(KINDS[name], original_max_position_embeddings=4)
    rotary = RotaryPositions(ModelConfig(kv_channels=128, rope_scaling=scaling), on_cpu=True)
    alone = [rotary(SequenceLayout(length)) for length in (3, 9)]
    documents = ((0, 3, 12), (0, 9, 12))
    for rank in range(2):
        layout = SequenceLayout(12, 0, rank, 2, cu_seqlens=documents)
        both = [torch.cat(alone), torch.cat(alone[::-1])]
        expected = torch.stack([x[6 * rank : 6 * rank + 6, 0] for x in both], dim=1)
        torch.testing.assert_close(rotary(layout), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        rotary(SequenceLayout.of_piece(range(8, 9), 9, 0)), alone[1][8:], rtol=0, atol=0
    )
    assert (alone[0][1] != alone[1][1]).any()


@given(layouts())
def test_positions_restart_with_every_document(ranks: list[SequenceLayout]) -> None:
    rotary = RotaryPositions(ModelConfig(kv_channels=4), on_cpu=True)
    bounds = ranks[0].bounds(0)
    expected = [p for a, b in zip(bounds, bounds[1:], strict=False) for p in range(b - a)]
    # The first channel turns by one radian a token, so its angle is the position. Sinks stand at 0.
    positions = [angle for layout in ranks for angle in rotary(layout)[:, 0, 0, 0].tolist()]
    assert positions == [0] * ranks[0].num_sink_tokens + expected
