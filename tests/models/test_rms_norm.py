"""The norm module: dtype, epsilon and the mark that sequence parallelism needs. Its arithmetic: tests/ops."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import Precision
from spikingbrain_train.models.rms_norm import RMSNorm
from spikingbrain_train.models.transformer_config import transformer_config
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    max_position_embeddings=64,
    mixers=["full"],
)


def config(precision: Precision = Precision.fp32, **parallel: object):
    return transformer_config(MODEL, ParallelConfig(**parallel), precision, on_cpu=True)


@pytest.mark.parametrize("precision", list(PARAMS_DTYPE))
def test_agrees_with_torch_in_the_models_dtype(precision: Precision) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(config(precision), 16, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = (torch.randn(5, 3, 16) * 2).to(norm.weight.dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (16,), norm.weight.float(), 1e-3)
    y = norm(x)
    assert y.dtype == x.dtype
    bound = 1e-6 if precision is Precision.fp32 else 2**-8  # bfloat16: one rounding of the result
    torch.testing.assert_close(y.float(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_partial_gradients_are_marked_for_summation(sequence_parallel: bool) -> None:
    split = config(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    assert RMSNorm(split, 16).weight.sequence_parallel is sequence_parallel
    assert RMSNorm(split, 16, sequence_parallel=False).weight.sequence_parallel is False
