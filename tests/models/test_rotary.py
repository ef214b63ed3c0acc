"""Rotary positions of slices, and Llama-3 scaling against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig, RopeScalingConfig
from spikingbrain_train.models.rotary import RotaryPositions, scale_rotary_frequencies
from tests.parallel.context_parallel.test_sequence_layout import layouts


@pytest.mark.parametrize(
    ("base", "scaling"),
    [
        (500000.0, RopeScalingConfig(factor=8.0)),
        (500000.0, RopeScalingConfig(factor=32.0, original_max_position_embeddings=4096)),
        (10000.0, RopeScalingConfig(factor=4.0, low_freq_factor=2.0, high_freq_factor=16.0)),
    ],
    ids=["Llama 3.1", "Llama 3.2", "other ramp"],
)
def test_scaled_frequencies_are_those_of_transformers(base: float, scaling: RopeScalingConfig) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    inv_freq = base ** (-torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    scaled = scale_rotary_frequencies(inv_freq, scaling)
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)  # float32 rounding
    assert (scaled[:4] == inv_freq[:4]).all()  # the fastest are left alone
    torch.testing.assert_close(scaled[-1], inv_freq[-1] / scaling.factor)  # the slowest are scaled in full


@given(layouts())
def test_positions_restart_with_every_document(ranks: list[SequenceLayout]) -> None:
    rotary = RotaryPositions(ModelConfig(kv_channels=4), on_cpu=True)
    bounds = ranks[0].bounds(0)
    expected = [p for a, b in zip(bounds, bounds[1:], strict=False) for p in range(b - a)]
    # The first channel turns by one radian a token, so its angle is the position. Sinks stand at 0.
    positions = [angle for layout in ranks for angle in rotary(layout)[:, 0, 0, 0].tolist()]
    assert positions == [0] * ranks[0].num_sink_tokens + expected
