"""Exports in this project's own format that hold packed ternary numbers and multiply by them as integers.

The reference is the Megatron model, which multiplies INT8 inputs by ternary weights as floats: bound 2e-4 of
float32 logits of order 1-10, as in test_own_format.py; greedy texts token for token. Integer products are
held to int64 sums, exactly but for the last multiplication by scales, of some 1e-7.

An input that float32 computes to within 1e-7 of a half is rounded up by one CPU's arithmetic and down by
another's. On one of two kinds of CPUs that were tried the Megatron model does so with one input, where both
forms of the export agree with what float64 gives; a tenth of the tokens, itself and some that see it, are up
to 7e-3 away then. So the bound holds for most tokens, and one step of rounding is what the others may be off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.ternary import TERNARY_WEIGHTS
from spikingbrain_train.config.linear_transforms import Int8InputsConfig, Projection, TernaryConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.average import average_checkpoints, equal_shares
from spikingbrain_train.conversion.difference import diff_checkpoints
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.hf.int8_inputs_spikingbrain import Int8Inputs
from spikingbrain_train.hf.linears_spikingbrain import TransformedLinear
from spikingbrain_train.hf.modeling_spikingbrain import SpikingBrainForCausalLM
from spikingbrain_train.hf.ternary_spikingbrain import PackedTernaryLinear, TernaryWeights, unpacked
from spikingbrain_train.ops.ternary import (
    magnitude_sum,
    pack_ternary,
    ternary_codes,
    ternary_scales,
    unpack_ternary,
)
from tests.conversion.hf_models import all_tensors
from tests.conversion.test_own_format import (
    DOCUMENTS,
    TEXT,
    TOLERANCE,
    check_greedy_text,
    save_and_compute,
)
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool

FORMAT = "spikingbrain_packed"
ONE_STEP = 2e-2
NAMES = ("ternary weights, INT8 inputs", "ternary experts, INT8 inputs, spikes")
"""All linears of all kinds of layers, the gate's included; experts, some of whose inputs are spikes."""


@dataclass(frozen=True)
class Exported:
    """A Megatron checkpoint, its export, and what both compute."""

    megatron: Path
    folder: Path
    model: ModelConfig
    expected: Any
    report: Any


@pytest.fixture(scope="module", params=NAMES)
def exported(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("packed")
    arguments = (case.model, case.model, folder / "megatron")
    (expected,) = ranks.run(save_and_compute, *arguments, world_size=1, parallel=ParallelConfig())
    report = export_checkpoint(folder / "megatron", folder / "packed", format_name=FORMAT)
    return Exported(folder / "megatron", folder / "packed", case.model, expected, report)


def loaded(folder: Path) -> SpikingBrainForCausalLM:
    return SpikingBrainForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of most tokens they are the same; none is further off than one input on the other side of a half."""
    off = (found - expected).abs().amax(-1).flatten()
    assert off.quantile(0.75) <= TOLERANCE
    assert off.max() <= ONE_STEP


def packed_linears(model: nn.Module) -> list[PackedTernaryLinear]:
    return [module for module in model.modules() if isinstance(module, PackedTernaryLinear)]


def test_logits_and_tokens_are_those_of_training(exported: Exported) -> None:
    theirs, expected = loaded(exported.folder), exported.expected
    assert packed_linears(theirs)
    with torch.no_grad():
        check_logits(theirs(TEXT).logits, expected.logits)
        documents = theirs(TEXT[:1], cu_seqlens=torch.tensor(DOCUMENTS)).logits
        check_logits(documents, expected.packed)
    check_greedy_text(theirs, expected)


def test_the_folder_computes_with_the_code_that_it_carries(exported: Exported) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        exported.folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    with torch.no_grad():
        check_logits(model(TEXT).logits, exported.expected.logits)


def test_two_bits_a_weight_are_stored_and_the_report_says_so(exported: Exported) -> None:
    tensors = all_tensors(exported.folder)
    packed = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype is torch.uint8)
    ternary = [
        weight
        for _, weight in model_weights(exported.model)
        if weight.projection is not None and TERNARY_WEIGHTS.applies(exported.model, *weight.projection)
    ]
    numel = sum(weight.numel for weight in ternary)
    assert 4 * packed == numel > 0
    assert exported.report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert any(f"{numel:,} ternary weights take" in note for note in exported.report.notes)


def test_training_can_go_on_from_parameters_that_are_rounded_to_the_same(
    exported: Exported, tmp_path: Path
) -> None:
    report = import_checkpoint(exported.folder, tmp_path / "megatron")
    assert any("not in the folder" in note for note in report.notes)
    export_checkpoint(tmp_path / "megatron", tmp_path / "again", format_name=FORMAT)
    again, tensors = all_tensors(tmp_path / "again"), all_tensors(exported.folder)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in again)
    first, second = (
        json.loads((each / "config.json").read_text()) for each in (exported.folder, tmp_path / "again")
    )
    assert first == second
    assert not diff_checkpoints(exported.folder, tmp_path / "again").differ


def test_where_gradients_are_wanted_the_numbers_are_floats(exported: Exported) -> None:
    model = loaded(exported.folder)
    embedded = model.get_input_embeddings()(TEXT).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    check_logits(logits, exported.expected.logits)
    logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.isfinite().all() and embedded.grad.abs().max() > 0
    assert all(linear.weight.grad is None for linear in packed_linears(model))


def test_bfloat16_holds_the_same_numbers(exported: Exported) -> None:
    model = SpikingBrainForCausalLM.from_pretrained(exported.folder, dtype=torch.bfloat16).eval()
    assert all(linear.weight.dtype is torch.uint8 for linear in packed_linears(model))
    for narrow, wide in zip(packed_linears(model), packed_linears(loaded(exported.folder)), strict=True):
        # One number a matrix is rounded to eight digits, and -1, 0 and 1 times it.
        assert torch.equal(narrow.float_weight(torch.bfloat16), wide.float_weight(torch.float32).bfloat16())
    with torch.no_grad():
        assert model(TEXT).logits.isfinite().all()


def test_the_checkpoint_and_its_export_do_not_differ(exported: Exported, tmp_path: Path) -> None:
    found = diff_checkpoints(exported.megatron, exported.folder)
    assert not found.differ, found.text(5)
    assert any("what they are rounded to" in note for note in found.notes)
    name = next(name for name, tensor in all_tensors(exported.folder).items() if tensor.dtype is torch.uint8)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((exported.folder / "config.json").read_text())
    tensors = load_file(exported.folder / "model.safetensors")
    codes = unpack_ternary(tensors[name])
    codes[0, 0] = -1 if codes[0, 0] else 1
    tensors[name] = pack_ternary(codes)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for one in (exported.megatron, exported.folder):
        (worst, *others) = diff_checkpoints(one, other).tensors
        assert worst.name == name and worst.largest is not None
        scale = tensors[f"{name}_scale"].item()
        assert worst.largest == pytest.approx(scale, rel=1e-6) or worst.largest == pytest.approx(2 * scale)
        assert all(each.largest == 0 for each in others)


def test_packed_weights_have_no_average(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"an average of -1, 0 and 1 is none of them; average the ch"):
        average_checkpoints([exported.folder, exported.folder], tmp_path / "average", equal_shares(2))


@pytest.mark.parametrize("inputs", [8, 577, 4096])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_exact_integers_times_scales(tokens: int, inputs: int, has_bias: bool) -> None:
    """Against int64 sums, and against the fake-quantised product, which adds up rounded floats."""
    generator = torch.Generator().manual_seed(inputs + tokens)
    plain = nn.Linear(inputs, 52, bias=has_bias)
    weight = torch.randn(52, inputs, generator=generator)
    plain.weight.data.copy_(weight)
    fake = TransformedLinear(plain)
    fake.add("int8_inputs", Int8Inputs(None, plain), [plain])
    fake.add("ternary", TernaryWeights(None, plain), [plain])
    scale = ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)
    codes = ternary_codes(weight, scale)
    linear = PackedTernaryLinear(fake)
    linear.weight.data, linear.weight_scale.data = pack_ternary(codes), scale.reshape(1)
    # One token's inputs are all at the largest, one's are as small as INT8 numbers are made of at all.
    x = torch.randn(tokens, inputs, generator=generator)
    x[0] = 3.0
    x[-1] *= 1e-6 if tokens > 1 else 1.0
    with torch.no_grad():
        assert linear.multiplies_integers(x)
        found, faked = linear(x), fake(x)
    per_unit = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    whole = (x * per_unit).round().clamp(-127, 127).long()
    exact = (whole @ codes.long().t()).float() * per_unit.reciprocal() * scale
    exact = exact if plain.bias is None else exact + plain.bias
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)
    # 4,096 float32 terms of up to 3 round off some 1e-4 of sums that may cancel.
    torch.testing.assert_close(found, faked, rtol=1e-4, atol=3e-4)


def test_bytes_are_unpacked_as_they_are_packed() -> None:
    codes = torch.randint(-1, 2, (64, 33), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    packed = pack_ternary(codes)
    assert torch.equal(unpacked(packed), codes) and torch.equal(unpack_ternary(packed), codes)


MODEL = CASES[NAMES[0]].model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ternary": TernaryConfig(), "int8_inputs": Int8InputsConfig()}, "models without ternary weights"),
        ({"ffn_hidden_size": 30}, "rows that 4 does not divide"),
    ],
)
def test_what_is_not_packed_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"--format {FORMAT} cannot hold .*{words}"):
        format_of_model(replace(MODEL, **changes), FORMAT)


def test_matrices_that_are_not_packed_may_be_narrow() -> None:
    narrow = replace(MODEL, ffn_hidden_size=30, ternary=TernaryConfig([Projection.qkv]))
    assert format_of_model(narrow, FORMAT).name == FORMAT


def test_nobody_gets_it_unasked() -> None:
    assert not format_of_model(MODEL).is_for_inference
