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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.registry import format_of_model, parse_hf_config
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_codes, ternary_scales, unpack_ternary
from tests.conversion.hf_models import SIZES, randomise
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.conversion.test_own_format import TEXT, TOLERANCE, check_greedy_text, save_and_compute
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool

LINEARS = [each for each in Projection if each is not Projection.gate]
MARGIN = 5e-5
"""In steps of INT8 numbers: 127 times some 4e-7 by which float32 activations differ."""
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

    # As commands do, which run no code of folders without leave.
    to: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    ours: Any = load_causal_lm(folder, trust_remote_code=False, **to)
    with torch.no_grad():
        assert torch.equal(ours(TEXT).logits, logits)

    report = import_checkpoint(folder, tmp_path / "back")
    assert any("not in the folder" in note for note in report.notes)
    export_checkpoint(tmp_path / "back", tmp_path / "again", format_name="bitnet")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[each], tensors[each]) for each in again)


def published(folder: Path, dtype: torch.dtype, said: dict[str, Any], **changes: Any) -> Path:
    """A small random Llama, packed by transformers' own function, with the reciprocals of its scales."""
    packing: Any = pytest.importorskip("transformers.integrations.bitnet")
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 2, **changes}))
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [each for each in tensors if each.endswith("_proj.weight")]:
        scale = 1.0 / tensors[name].float().abs().mean()
        tensors[name] = packing.pack_weights((tensors[name].float() * scale).round().clamp(-1, 1))
        tensors[f"{name}_scale"] = scale.reshape(1).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_packed(ours: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    """Bit for bit, but for scales: float32 has not the reciprocal's reciprocal of every number."""
    assert ours.keys() == given.keys()
    for name, value in given.items():
        if name.endswith("_scale"):
            torch.testing.assert_close(ours[name], value.float(), rtol=2**-23, atol=0)
        else:
            assert ours[name].dtype is value.dtype and torch.equal(ours[name], value), name


def logits_and_clear_tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, vocabulary] of TOKENS, and which tokens [B, T] can be compared.

    No INT8 input of these, nor of a token before, lies within MARGIN of a half, where the order of a float32
    sum decides which number it becomes.
    """
    is_clear = torch.ones(TOKENS.shape, dtype=torch.bool)

    def look(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        (x,) = inputs
        number = x.double() * 127 / x.double().abs().amax(-1, keepdim=True)
        is_clear.logical_and_((number - number.floor() - 0.5).abs().amin(-1) > MARGIN)

    for module in model.modules():
        if type(module).__name__ == "BitLinear":
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits, is_clear.long().cummin(1).values.bool()


@pytest.mark.parametrize(
    ("dtype", "said", "changes"),
    [
        (torch.float32, {"linear_class": "bitlinear", "quantization_mode": "offline"}, {}),
        # As folders were written before there were several classes.
        (torch.bfloat16, {"modules_to_not_convert": None}, {"tie_word_embeddings": True}),
        (torch.float32, {"modules_to_not_convert": ["lm_head"]}, {"attention_bias": True, "mlp_bias": True}),
    ],
    ids=["float32", "bfloat16, older", "biases"],
)
def test_a_folder_of_the_class_bitlinear_becomes_parameters_that_are_rounded_to_it(
    dtype: torch.dtype, said: dict[str, Any], changes: dict[str, Any], ranks: RankPool, tmp_path: Path
) -> None:
    folder = published(tmp_path / "published", dtype, {"quant_method": "bitnet"} | said, **changes)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs.model.layers[0].mlp.down_proj).__name__ == "BitLinear"
    theirs = torch.nn.Module.float(theirs)  # it leaves tensors beside packed ones in the folder's format
    expected, is_clear = logits_and_clear_tokens(theirs)
    import_checkpoint(folder, tmp_path / "megatron")
    model = load_model_config(tmp_path / "megatron/iter_0000000/model_config.yaml")
    assert set(model.ternary.projections) == set(model.int8_inputs.projections) == set(LINEARS)
    (found,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ParallelConfig())
    assert expected.std() > 0.1 and is_clear.sum() >= 5
    assert (found - expected)[is_clear].abs().max() <= TOLERANCE

    export_checkpoint(tmp_path / "megatron", tmp_path / "again", format_name="bitnet")
    ours, given = (load_file(each / "model.safetensors") for each in (tmp_path / "again", folder))
    assert_same_packed(ours, given)
    was, now = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert now == was

    # What is not packed says nothing of packing, and transformers reads it.
    export_checkpoint(tmp_path / "megatron", tmp_path / "floats", format_name="llama", float_weights=True)
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"use_rms_norm": True}, "without use_rms_norm"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}, "null or lm_head alone"),
        ({"quant_method": "gptq"}, "import the unquantised checkpoint"),
        ({"linear_class": "autobitlinear"}, "import the unquantised checkpoint"),
    ],
)
def test_other_quantisations_of_a_llama_are_refused(said: dict[str, Any], words: str) -> None:
    values = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    with pytest.raises(CheckpointError, match=words):
        parse_hf_config(
            values | {"quantization_config": {"quant_method": "bitnet"} | said}, Path("config.json")
        )


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
