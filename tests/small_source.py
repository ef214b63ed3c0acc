"""A small dense model with a real tokenizer, as a user would bring one: a folder that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END = "<|endoftext|>"
VOCAB_SIZE = 320
MODEL_VOCAB_SIZE = 384
"""A little larger than the tokenizer's, as in published models."""


def save_small_source(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2 of four layers with a byte-level BPE of 320 tokens, trained on a few topics."""
    save_small_tokenizer(folder)
    torch.manual_seed(seed)
    Qwen2ForCausalLM(Qwen2Config(**_SIZES, intermediate_size=48, num_hidden_layers=4)).save_pretrained(folder)
    return folder


def save_small_llama(folder: Path) -> Path:
    """A random Llama of two layers, of widths that blocks of 32 divide, with the same tokenizer."""
    save_small_tokenizer(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=64, num_hidden_layers=2)).save_pretrained(folder)
    return folder


_SIZES: dict[str, Any] = {
    **{"vocab_size": MODEL_VOCAB_SIZE, "hidden_size": 32, "max_position_embeddings": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    **{"bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2},
}


def save_small_tokenizer(folder: Path) -> None:
    """That of the small models: a byte-level BPE of 320 tokens, trained on a few topics."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator([topics[key] for key in sorted(topics)[:5]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=END).save_pretrained(str(folder))
    # As in every Qwen2 folder. Without it transformers takes another class when the model type is not qwen2.
    described = folder / "tokenizer_config.json"
    described.write_text(
        json.dumps(json.loads(described.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"})
    )
