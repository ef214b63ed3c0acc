"""Adapters of peft beside projections that compute otherwise, and beside and in Mamba layers.

Bound: 1e-5 of the largest logit, as in test_adapters.py, in float64: a number that is rounded shows the order
of a sum before it as a whole step where it lies near a half, in float32 about once in 50,000.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spikingbrain_train.bricks.adapters import attach, detach, merge
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.errors import ConfigurationError
from tests.bricks.test_adapters import adapter_of
from tests.conversion.megatron_models import TOKENS, load_megatron_model
from tests.conversion.test_own_format import save_and_compute
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

LINEARS: list[Projection] = [each for each in Projection if each is not Projection.gate]
DENSE = replace(CASES["full attention"].model, norm_epsilon=1e-5)
MAMBA = CASES["Mamba, norms and biases, sinks, packed documents"].model
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_MAMBA = ["in_proj", "out_proj"]

MODELS: dict[str, tuple[ModelConfig, list[str]]] = {
    "beside Mamba layers": (replace(MAMBA, mixers=["mamba", "swa"]), ATTENTION),
    "in Mamba layers and beside them": (replace(MAMBA, mixers=["mamba", "full"]), [*ATTENTION, *IN_MAMBA]),
    "Mamba beside attention in a layer": (MAMBA, IN_MAMBA),
    "spikes": (replace(DENSE, spiking=SpikingConfig(LINEARS)), ATTENTION),
    "spikes, Mamba": (
        replace(MAMBA, mixers=["mamba", "swa"], spiking=SpikingConfig([Projection.qkv])),
        [*ATTENTION, *IN_MAMBA],
    ),
    "INT8 inputs": (replace(DENSE, int8_inputs=Int8InputsConfig(LINEARS)), ATTENTION),
    "ternary weights": (replace(DENSE, ternary=TernaryConfig(LINEARS)), ATTENTION),
    "ternary weights, INT8 inputs, spikes": (
        replace(
            DENSE,
            ternary=TernaryConfig(LINEARS),
            int8_inputs=Int8InputsConfig([Projection.qkv, Projection.mlp_fc1]),
            spiking=SpikingConfig([Projection.mlp_fc2]),
        ),
        ATTENTION,
    ),
    # An export that transformers' own class reads, whose linears are AutoBitLinear.
    "BitNet of transformers": (
        replace(
            DENSE,
            attn_sub_norm=True,
            ffn_sub_norm=True,
            add_qkv_bias=False,
            activation_func=ActivationFunc.relu2,
            ternary=TernaryConfig(LINEARS),
            int8_inputs=Int8InputsConfig(LINEARS),
        ),
        ATTENTION,
    ),
}
MERGED = ("beside Mamba layers", "in Mamba layers and beside them", "spikes", "spikes, Mamba")


def logits_of(groups: ProcessGroups, folder: Path) -> torch.Tensor:
    """Of the Megatron model in a folder, in float64."""
    model = load_megatron_model(groups, folder).double()
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS)
    return logits[..., : DENSE.vocab_size]


def of_peft(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of peft's model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    # Quantised models forbid their own double().
    adapted = torch.nn.Module.double(peft.PeftModel.from_pretrained(model, adapter)).eval()
    with torch.no_grad():
        logits: torch.Tensor = adapted(TOKENS).logits
    return logits


def attach_to_saved(name: str, ranks: RankPool, folder: Path) -> None:
    """A model of ``MODELS`` as ``megatron`` and ``base``, and ``peft``'s adapter ``attached`` to it."""
    model, targets = MODELS[name]
    ranks.run(save_and_compute, model, model, folder / "megatron", world_size=1, parallel=ParallelConfig())
    export_checkpoint(folder / "megatron", folder / "base")
    adapter_of(folder / "base", folder / "peft", 3, targets)
    attach(folder / "megatron", [folder / "peft"], ["code"], folder / "attached")


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_peft_computes_the_same_beside_it_and_comes_back_bit_for_bit(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    attach_to_saved(name, ranks, tmp_path)
    expected = of_peft(tmp_path / "base", tmp_path / "peft")
    (logits,) = ranks.run(logits_of, tmp_path / "attached", world_size=1, parallel=ParallelConfig())
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    (of_base,) = ranks.run(logits_of, tmp_path / "megatron", world_size=1, parallel=ParallelConfig())
    assert (logits - of_base).abs().max() > 0.1 * expected.abs().max()

    detach(tmp_path / "attached", "code", tmp_path / "back", base=str(tmp_path / "base"))
    before, after = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(of_peft(tmp_path / "base", tmp_path / "back"), expected)


@pytest.mark.parametrize("name", MERGED)
def test_adapters_behind_spikes_and_in_mamba_are_merged_as_peft_merges(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    attach_to_saved(name, ranks, tmp_path)
    merge(tmp_path / "attached", tmp_path / "merged")
    if not MODELS[name][0].spiking.projections:  # whose counts show that weights are rounded once more
        expected = of_peft(tmp_path / "base", tmp_path / "peft")
        (logits,) = ranks.run(logits_of, tmp_path / "merged", world_size=1, parallel=ParallelConfig())
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload().state_dict()
    export_checkpoint(tmp_path / "merged", tmp_path / "of_merged")
    for key, value in load_file(tmp_path / "of_merged/model.safetensors").items():
        torch.testing.assert_close(value, merged[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ternary": TernaryConfig([Projection.mlp_fc2])}, "down_proj cannot be merged: model.ternary.proj"),
        (
            {"int8_inputs": Int8InputsConfig([Projection.qkv])},
            "k_proj, q_proj, v_proj cannot be merged: m",
        ),
        ({"quantization": QuantizationConfig([Projection.qkv], 8)}, "cannot be merged: model.quantization.p"),
    ],
)
def test_adapters_beside_what_is_rounded_are_not_merged(
    changes: dict, words: str, ranks: RankPool, tmp_path: Path
) -> None:
    model = replace(DENSE, **changes, lora=LoraConfig(names=["code"], ranks=[3]))
    ranks.run(save_and_compute, model, model, tmp_path / "adapted", world_size=1, parallel=ParallelConfig())
    with pytest.raises(ConfigurationError, match=words) as caught:
        merge(tmp_path / "adapted", tmp_path / "merged")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()
