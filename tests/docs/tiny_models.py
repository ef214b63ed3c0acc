"""A program that makes a tiny model of a family with a real tokenizer: tiny_models.py FAMILY FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"),
)
"""What the Llama takes of the Qwen2's config."""
LAYERS = 8
"""Of the Llama: the first layers of the 76B form, with each kind that it has, and halves for two stages."""
CONTEXT = 131072
"""Positions, as many as the longest sequence of a page."""


def make(family: str, folder: Path) -> None:
    """A Qwen2 of four layers, or a Llama as wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.small_source import save_small_source

    save_small_source(folder)
    described = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    if family == "llama":
        shape = {name: described[name] for name in SHAPE} | {"num_hidden_layers": LAYERS}
        config = LlamaConfig(**shape, bos_token_id=None)
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(described))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    make(sys.argv[1], Path(sys.argv[2]))
