"""Packed BitNetForCausalLM folders, in the published layout, both ways; transformers' class is the reference.

Bound of logits: 2e-4 on float32 logits of order 1-10, as in test_logits.py. Ternary numbers and scales are
held exactly.
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
from transformers import AutoModelForCausalLM

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.config.linear_transforms import Int8InputsConfig, Projection, TernaryConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.registry import format_of_model, parse_hf_config
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.errors import CheckpointError
from tests.conversion.hf_models import SIZES, all_tensors, randomise
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.conversion.test_bitnet_folder import assert_same_packed, logits_and_clear_tokens
from tests.conversion.test_own_format import TEXT, check_greedy_text, save_and_compute
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool

bitnet: Any = pytest.importorskip("transformers.models.bitnet")
packing: Any = pytest.importorskip("transformers.integrations.bitnet")

TOLERANCE = 2e-4
PUBLISHED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
BITLINEAR = PUBLISHED | {"linear_class": "bitlinear"}
LINEARS = [each for each in Projection if each is not Projection.gate]
MODEL = replace(
    CASES["full attention"].model,
    add_qkv_bias=False,
    attn_sub_norm=True,
    ffn_sub_norm=True,
    activation_func=ActivationFunc.relu2,
    ternary=TernaryConfig(LINEARS),
    int8_inputs=Int8InputsConfig(LINEARS),
)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles how it rounds; as it is written it needs no compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def published(
    folder: Path, dtype: torch.dtype = torch.bfloat16, said: dict[str, Any] = PUBLISHED, **changes: Any
) -> Path:
    """A small random checkpoint in the published layout, packed by transformers' function.

    Scales that the class ``bitlinear`` divides by are reciprocals.
    """
    model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig(**{**SIZES, **changes}))
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensors[name] = value
        if name.endswith("_proj.weight"):
            scale = value.float().abs().mean()
            tensors[name] = packing.pack_weights((value.float() / scale).round().clamp(-1, 1))
            stored = scale if said is PUBLISHED else 1.0 / scale
            tensors[f"{name}_scale"] = stored.reshape(1).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=said)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def loaded(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "BitNetForCausalLM"
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "AutoBitLinear"
    # It leaves tensors beside packed ones in the folder's format, and forbids its own float().
    return torch.nn.Module.float(model)


def logits_by_transformers(folder: Path) -> torch.Tensor:
    model = loaded(folder)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("published"), tie_word_embeddings=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_published_folder_becomes_parameters_that_are_rounded_to_it(
    dtype: torch.dtype, folder: Path, ranks: RankPool, tmp_path: Path
) -> None:
    if dtype is torch.float32:
        folder = published(tmp_path / "published", dtype)
    expected = logits_by_transformers(folder)
    report = import_checkpoint(folder, tmp_path / "megatron")
    assert any("not in the folder" in note for note in report.notes)
    model = load_model_config(tmp_path / "megatron/iter_0000000/model_config.yaml")
    assert set(model.ternary.projections) == set(model.int8_inputs.projections) == set(LINEARS)
    arguments = (megatron_logits, tmp_path / "megatron")
    (found,) = ranks.run(*arguments, world_size=1, parallel=ParallelConfig())
    assert expected.std() > 0.1 and (found - expected).abs().max() <= TOLERANCE

    # Its numbers, scales and config.json come back; the floats in between are of the folder's format.
    export_checkpoint(tmp_path / "megatron", tmp_path / "again", format_name="bitnet_packed")
    ours, theirs = all_tensors(tmp_path / "again"), all_tensors(folder)
    assert ours.keys() == theirs.keys() and sum(name.endswith("_scale") for name in ours) == 7 * 4
    for name, value in theirs.items():
        of_scale = name.endswith("_scale")
        assert ours[name].dtype is (torch.float32 if of_scale else value.dtype)
        assert torch.equal(ours[name], value.float() if of_scale else value), name
    was, now = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert now == was
    export_checkpoint(tmp_path / "megatron", tmp_path / "masters")
    config = json.loads((tmp_path / "masters/config.json").read_text())
    assert config["quantization_config"] == PUBLISHED | {"quantization_mode": "online"}
    masters = all_tensors(tmp_path / "masters")
    assert {value.dtype for value in masters.values()} == {dtype}
    # transformers rounds these floats online to the same model, in its own arithmetic.
    online: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "masters", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (online(TOKENS).logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "said", "changes"),
    [
        (torch.float32, BITLINEAR, {"attention_bias": True}),
        (torch.bfloat16, {"quant_method": "bitnet"}, {"tie_word_embeddings": True}),
    ],
    ids=["float32, biases", "bfloat16, no class named"],
)
def test_a_folder_of_the_class_bitlinear_becomes_parameters_that_are_rounded_to_it(
    dtype: torch.dtype, said: dict[str, Any], changes: dict[str, Any], ranks: RankPool, tmp_path: Path
) -> None:
    folder = published(tmp_path / "published", dtype, said, num_hidden_layers=2, **changes)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "BitNetForCausalLM"
    assert type(theirs.model.layers[0].mlp.down_proj).__name__ == "BitLinear"
    expected, is_clear = logits_and_clear_tokens(torch.nn.Module.float(theirs))
    import_checkpoint(folder, tmp_path / "megatron")
    model = load_model_config(tmp_path / "megatron/iter_0000000/model_config.yaml")
    assert set(model.ternary.projections) == set(model.int8_inputs.projections) == set(LINEARS)
    assert model.attn_sub_norm and model.ffn_sub_norm and model.activation_func is ActivationFunc.relu2
    arguments = (megatron_logits, tmp_path / "megatron")
    (found,) = ranks.run(*arguments, world_size=1, parallel=ParallelConfig())
    assert expected.std() > 0.1 and is_clear.sum() >= 5
    assert (found - expected)[is_clear].abs().max() <= TOLERANCE

    export_checkpoint(tmp_path / "megatron", tmp_path / "again", format_name="bitnet_bitlinear")
    ours, given = all_tensors(tmp_path / "again"), all_tensors(folder)
    assert_same_packed(ours, given)
    was, now = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert now == was | {"quantization_config": BITLINEAR | said}
    if model.add_output_bias:
        with pytest.raises(CheckpointError, match="cannot hold .*biases"):
            export_checkpoint(tmp_path / "megatron", tmp_path / "other", format_name="bitnet_packed")


def test_transformers_loads_two_bits_a_weight_and_writes_the_same_tokens(
    ranks: RankPool, tmp_path: Path
) -> None:
    target = tmp_path / "packed"
    arguments = (MODEL, MODEL, tmp_path / "megatron")
    (expected,) = ranks.run(save_and_compute, *arguments, world_size=1, parallel=ParallelConfig())
    report = export_checkpoint(tmp_path / "megatron", target, format_name="bitnet_packed")
    assert json.loads((target / "config.json").read_text())["quantization_config"] == PUBLISHED
    theirs = loaded(target)
    with torch.no_grad():
        logits = theirs(TEXT).logits
    assert logits.std() > 0.1 and (logits - expected.logits).abs().max() <= TOLERANCE
    check_greedy_text(theirs, expected)

    tensors = all_tensors(target)
    packed = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype is torch.uint8)
    projections = sum(weight.numel for _, weight in model_weights(MODEL) if weight.projection is not None)
    assert 4 * packed == projections
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())

    import_checkpoint(target, tmp_path / "back")
    export_checkpoint(tmp_path / "back", tmp_path / "again", format_name="bitnet_packed")
    again = all_tensors(tmp_path / "again")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)


def test_inspection_tells_what_the_parameters_would_be(folder: Path) -> None:
    found = inspect_checkpoint(folder)
    assert found.model.ternary.projections and found.model.attn_sub_norm
    names = [tensor.name for tensor in found.tensors]
    assert "model.layers.0.mlp.up_proj.weight" in names and not any("_scale" in name for name in names)
    assert not any("uint8" in str(tensor) for tensor in found.tensors)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mlp.up_proj.weight", torch.full((12, 32), 0b11, dtype=torch.uint8), "other numbers than -1, 0 and"),
        ("mlp.up_proj.weight", torch.full((12, 32), 0b01010101, dtype=torch.uint8), "nothing but zeros"),
        ("mlp.up_proj.weight", torch.ones(48, 32), "is not packed, although"),
        ("mlp.up_proj.weight", torch.ones(13, 32, dtype=torch.uint8), r"has shape \[52, 32\]"),
        ("mlp.up_proj.weight_scale", torch.tensor([-1.0]), "is -1, but .* scale of at least 1e-5"),
        ("mlp.up_proj.weight_scale", torch.tensor([torch.nan]), "is nan, but"),
        ("mlp.up_proj.weight_scale", torch.ones(2), "no .* of one number beside"),
        ("mlp.up_proj.weight_scale", None, "no .* of one number beside"),
    ],
)
def test_a_damaged_folder_is_refused(
    name: str, value: torch.Tensor | None, words: str, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    whole, damaged = f"model.layers.1.{name}", tmp_path / "damaged"
    damaged.mkdir()
    if value is None:
        del tensors[whole]
    else:
        tensors[whole] = value
    (damaged / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(damaged, tmp_path / "megatron")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": BITLINEAR | {"quantization_mode": "online"}}, "import the unquantised"),
        ({"quantization_config": BITLINEAR | {"use_rms_norm": True}}, "without use_rms_norm"),
        ({"quantization_config": PUBLISHED | {"use_rms_norm": True}}, "without use_rms_norm"),
        ({"quantization_config": PUBLISHED | {"modules_to_not_convert": ["x"]}}, "null or lm_head alone"),
        ({"attention_bias": True}, "multiplies biases by weight_scale as well"),
    ],
)
def test_what_is_not_read_is_refused(changes: dict[str, Any], words: str) -> None:
    values = {**SIZES, "architectures": ["BitNetForCausalLM"], "model_type": "bitnet"}
    with pytest.raises(CheckpointError, match=words):
        parse_hf_config(values | {"quantization_config": PUBLISHED} | changes, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ternary": TernaryConfig([Projection.qkv])}, "linears without ternary weights and INT8 inputs"),
        ({"ternary": TernaryConfig(), "int8_inputs": Int8InputsConfig()}, "linears without ternary weights"),
        ({"attn_sub_norm": False}, "layers without norms in front of output projections"),
        ({"add_qkv_bias": True, "add_output_bias": True}, "biases, which its class multiplies by the scale"),
        ({"ffn_hidden_size": 30}, "rows that 4 does not divide"),
    ],
)
def test_a_model_that_transformers_would_compute_otherwise_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    model: ModelConfig = replace(MODEL, **changes)
    with pytest.raises(CheckpointError, match=f"--format bitnet_packed cannot hold .*{words}"):
        format_of_model(model, "bitnet_packed")


def test_nobody_gets_packed_weights_unasked() -> None:
    assert format_of_model(MODEL).name == "bitnet_masters"
