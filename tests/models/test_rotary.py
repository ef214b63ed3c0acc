"""Rotary positions of slices, and their scaling against transformers' own, in training and in exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spikingbrain_train.architecture.backends.backend import Machine
from spikingbrain_train.architecture.rotary import attention_factor
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, RotaryBackend
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.config.run import Precision
from spikingbrain_train.conversion.formats.rope import scaling_values
from spikingbrain_train.hf.rotary_gla_swa import RotaryPositions as HFRotaryPositions
from spikingbrain_train.models import rotary
from spikingbrain_train.models.rotary import RotaryPositions, turned
from spikingbrain_train.models.transformer_config import transformer_config
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


def complex_products(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Channels i and i + K / 2 as one number, times ``exp(i angle)``: float64, then as precise as ``x``."""
    assert angles.dtype == torch.float32 and angles.shape[1:3] == (1, 1) and len(angles) == len(x)
    real, imaginary = x.double().chunk(2, dim=-1)
    half = angles[..., : angles.shape[-1] // 2].double()
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(half), half)
    return torch.cat((product.real, product.imag), dim=-1).to(x.dtype)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On a GPU with Transformer Engine, whose calls are counted, as their lengths."""
    calls: list[int] = []

    def counted(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
        calls.append(len(x))
        return complex_products(x, angles, interleaved)

    monkeypatch.setattr(rotary, "machine_of", lambda _: Machine(True, lambda name: None, lambda name: True))
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda **_: None)  # nobody asks it
    monkeypatch.setattr(transformer_engine, "fused_apply_rotary_pos_emb", counted, raising=False)
    return calls


MODEL = ModelConfig(
    num_layers=1,
    hidden_size=48,
    ffn_hidden_size=64,
    num_attention_heads=3,
    num_query_groups=3,
    kv_channels=16,
)
CONFIG = transformer_config(MODEL, ParallelConfig(), Precision.fp32, on_cpu=True)


def turned_pair(layout: SequenceLayout, backend: RotaryBackend, dtype: torch.dtype) -> list[Tensor]:
    """Queries that are a part of a wider tensor, turned, and their gradient."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 2, 3, 24, generator=generator).to(dtype).requires_grad_()
    y = turned(x[..., 4:20], RotaryPositions(MODEL, on_cpu=True)(layout), CONFIG, backend)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(dtype))
    return [y.detach(), gradient]


def test_both_kernels_turn_by_the_same_angles(on_gpu: list[int]) -> None:
    layout = SequenceLayout(17, num_sink_tokens=3)
    fused = turned_pair(layout, RotaryBackend.auto, torch.float32)
    assert on_gpu == [20]
    for ours, plain in zip(fused, turned_pair(layout, RotaryBackend.megatron, torch.float32), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)  # float32 rounding of numbers of about 4
    assert on_gpu == [20]


def test_bfloat16_is_turned_by_angles_that_are_not_rounded(on_gpu: list[int]) -> None:
    layout = SequenceLayout(20)
    (exact, _) = turned_pair(layout, RotaryBackend.auto, torch.float64)
    errors = [
        (turned_pair(layout, backend, torch.bfloat16)[0].double() - exact).abs().mean()
        for backend in (RotaryBackend.auto, RotaryBackend.megatron)
    ]
    assert errors[0] < errors[1]


def test_rows_with_documents_of_their_own_are_left_to_megatron_core(on_gpu: list[int]) -> None:
    layout = SequenceLayout(20, cu_seqlens=((0, 5, 20), (0, 11, 20)))
    auto, plain = (
        turned_pair(layout, backend, torch.float32)
        for backend in (RotaryBackend.auto, RotaryBackend.megatron)
    )
    assert on_gpu == [] and all(torch.equal(*pair) for pair in zip(auto, plain, strict=True))
    with pytest.raises(ValueError, match="rotary=transformer_engine turns all rows of a batch alike"):
        turned_pair(layout, RotaryBackend.transformer_engine, torch.float32)
