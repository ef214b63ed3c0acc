"""Packed ternary weights: transformers' own quantisation loads them and computes as the Megatron model does.

Bounds as in test_own_format.py: logits 2e-4, generation token for token, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_codes, ternary_scales, unpack_ternary
from tests.conversion.test_own_format import TEXT, TOLERANCE, check_greedy_text, save_and_compute
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool

LINEARS = [each for each in Projection if each is not Projection.gate]
LLAMA = replace(
    CASES["full attention"].model,
    add_qkv_bias=False,
    ternary=TernaryConfig(LINEARS),
    int8_inputs=Int8InputsConfig(LINEARS),
)
MODELS = {
    "Llama": LLAMA,
    "Llama with biases": replace(LLAMA, add_qkv_bias=True, add_output_bias=True, add_mlp_bias=True),
}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles how it unpacks; as it is written it needs no compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def saved(ranks: RankPool, model: ModelConfig, folder: Path) -> Any:
    arguments = (model, model, folder)
    (expected,) = ranks.run(save_and_compute, *arguments, world_size=1, parallel=ParallelConfig())
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_two_bits_a_weight_and_writes_the_same_tokens(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    model, folder = MODELS[name], tmp_path / "packed"
    expected = saved(ranks, model, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", folder, format_name="bitnet")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == "BitLinear"
    with torch.no_grad():
        logits = loaded(TEXT).logits
    assert logits.std() > 0.1 and (logits - expected.logits).abs().max() <= TOLERANCE
    check_greedy_text(loaded, expected)

    tensors = load_file(folder / "model.safetensors")
    packed = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype is torch.uint8)
    projections = sum(weight.numel for _, weight in model_weights(model) if weight.projection is not None)
    assert 4 * packed == projections
    with pytest.raises(CheckpointError, match="quantization_config.* import the unquantised checkpoint"):
        import_checkpoint(folder, tmp_path / "again")


def test_what_is_packed_is_what_the_own_format_computes_with(ranks: RankPool, tmp_path: Path) -> None:
    bitnet: Any = pytest.importorskip("transformers.integrations.bitnet")
    saved(ranks, LLAMA, tmp_path / "megatron")
    assert format_of_model(LLAMA).name == "" and format_of_model(LLAMA).model_type == "spikingbrain"
    for name in ("bitnet", "spikingbrain"):
        export_checkpoint(tmp_path / "megatron", tmp_path / name, format_name=name)
    packed, floats = (load_file(tmp_path / name / "model.safetensors") for name in ("bitnet", "spikingbrain"))
    scales = {name for name in packed if name.endswith("_scale")}
    assert packed.keys() - scales == floats.keys() and len(scales) == 7 * LLAMA.num_layers
    for name in scales:
        weight, codes = floats[name.removesuffix("_scale")], packed[name.removesuffix("_scale")]
        scale = ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)
        assert packed[name].dtype is torch.float32 and packed[name] == scale.reciprocal()
        assert torch.equal(bitnet.unpack_weights(codes, torch.float32), ternary_codes(weight, scale))
        assert torch.equal(bitnet.pack_weights(ternary_codes(weight, scale)), codes)
        assert torch.equal(unpack_ternary(codes).float(), ternary_codes(weight, scale))
    config = json.loads((tmp_path / "bitnet/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "bitnet" and "auto_map" not in config


SPIKES = SpikingConfig([Projection.mlp_fc2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ternary": TernaryConfig([Projection.qkv])}, "other weights than ternary ones in qkv, attention_o"),
        ({"int8_inputs": Int8InputsConfig(LINEARS[:-1]), "spiking": SPIKES}, "spikes or INT8 weights"),
        ({"quantization": QuantizationConfig(keys_and_values=True)}, "INT8 keys and values"),
        ({"kv_channels": 6, "num_query_groups": 1}, "rows that 4 does not divide"),
        ({"mixers": ["gla"]}, "gated linear attention layers"),
    ],
)
def test_a_model_that_transformers_would_compute_otherwise_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=f"--format bitnet cannot hold .*{words}"):
        format_of_model(replace(LLAMA, **changes), "bitnet")
