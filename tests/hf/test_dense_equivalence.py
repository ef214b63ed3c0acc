"""With full attention in every layer the model is a Llama, Qwen2 or Qwen3, as transformers computes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

RENAMES = (
    ("model.embed_tokens.", "model.embeddings."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
    (".self_attn.", ".attn."),
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}


def llama() -> tuple[PreTrainedModel, dict]:
    config = LlamaConfig(**SIZES, rope_theta=5e5, tie_word_embeddings=True)
    return LlamaForCausalLM(config), {"attention_bias": False, "tie_word_embeddings": True, "rope_theta": 5e5}


def llama3() -> tuple[PreTrainedModel, dict]:
    config = LlamaConfig(**SIZES, rope_theta=1e4, rope_scaling=dict(LLAMA3_SCALING), head_dim=16)
    return LlamaForCausalLM(config), {
        "attention_bias": False,
        "head_dim": 16,
        "rope_theta": 1e4,
        "rope_scaling": LLAMA3_SCALING,
    }


def qwen2() -> tuple[PreTrainedModel, dict]:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_theta=1e6)), {"rope_theta": 1e6}


def qwen3() -> tuple[PreTrainedModel, dict]:
    config = Qwen3Config(**SIZES, rope_theta=1e6, head_dim=16)
    return Qwen3ForCausalLM(config), {
        "attention_bias": False,
        "qk_norm": True,
        "head_dim": 16,
        "rope_theta": 1e6,
    }


@pytest.mark.parametrize("family", [llama, llama3, qwen2, qwen3])
@pytest.mark.parametrize("window", [None, 1000])
def test_logits_equal_those_of_the_dense_family(
    random_model: Callable, family: Callable, window: int | None
) -> None:
    torch.manual_seed(0)
    dense, changes = family()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in dense.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model = random_model(
        num_hidden_layers=3, attn_layers=[0, 1, 2], sliding_window=window, norm_eps=1e-5, **changes
    )
    tensors = dense.state_dict()
    for old, new in RENAMES:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    model.load_state_dict(tensors)

    ids = torch.randint(1, 97, (2, 130), generator=generator)
    with torch.no_grad():
        expected = dense.eval()(ids).logits
        # float32 rounding over three layers; logits are of size 1 to 3.
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        generate = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **generate), dense.generate(ids, **generate))
