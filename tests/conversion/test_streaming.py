"""Memory does not grow with the model: conversion holds one parameter, or one expert, at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conversion.hf_models import SIZES

REPOSITORY = Path(__file__).parents[2]

# Converts each source there and back and prints the peak resident memory so far, in bytes.
CONVERT = """
import resource, sys
from pathlib import Path
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
for source in map(Path, sys.argv[1:]):
    import_checkpoint(source, source.with_suffix(".megatron"))
    export_checkpoint(source.with_suffix(".megatron"), source.with_suffix(".back"))
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

# The same for an upcycling to each number of experts.
UPCYCLE = """
import resource, sys
from pathlib import Path
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
source = Path(sys.argv[1])
for number in map(int, sys.argv[2:]):
    import_checkpoint(source, source.with_suffix(f".{number}"), ConversionConfig(
        mixers=[["gla", "swa"]],
        num_sink_tokens=8,
        feed_forwards=["moe"],
        moe=MoEConfig(num_experts=number),
        upcycling=UpcyclingConfig(reinit_fraction=0.5),
    ))
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_llama(folder: Path, num_layers: int, vocab_size: int = 101) -> int:
    """A Llama of ``num_layers`` layers of 13 MB in one file; returns the size of its weights in bytes."""
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": num_layers}
    sizes |= {"vocab_size": vocab_size}
    hidden, ffn = 512, 1536
    embedding = torch.ones(vocab_size, hidden)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            tensors[f"{prefix}{name}.weight"] = torch.ones(shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = sizes | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def peaks(script: str, *arguments: object) -> list[int]:
    """What ``script`` prints in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_peak_memory_is_the_same_for_a_model_six_times_as_large(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    assert write_llama(large, 24) - write_llama(small, 4) > 250e6
    peak_small, peak_large = peaks(CONVERT, small, large)
    # Buffering whole models would add the 268 MB by which the second one is larger; measured: under 10 MB.
    assert peak_large - peak_small < 40e6


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_peak_memory_is_the_same_for_a_large_tensor(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    assert write_llama(large, 1, vocab_size=80_000) - write_llama(small, 1) > 160e6
    peak_small, peak_large = peaks(CONVERT, small, large)
    # One copy of the embedding, which import and export each write as one tensor, would add 164 MB.
    assert peak_large - peak_small < 40e6


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_peak_memory_is_the_same_for_eight_times_as_many_experts(tmp_path: Path) -> None:
    write_llama(tmp_path / "source", 1)
    few, many = peaks(UPCYCLE, tmp_path / "source", 4, 32)
    # fc1 of 28 more experts is 176 MB and fc2 88 MB; measured: under 3 MB.
    assert many - few < 40e6
