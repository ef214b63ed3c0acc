"""Adapters of peft beside exported bases, and the same in the trainer's model.

Bound: 1e-5 of the largest logit, in float32: two implementations of four layers add up in another order.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spikingbrain_train.bricks.adapters import attach, detach, merge
from spikingbrain_train.bricks.compose import compose
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.conftest import hf_checkpoint  # noqa: F401
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed.pool import RankPool

BASES = {
    "llama": ("llama", ConversionConfig(mixers=["full"]), None),
    "qwen2": ("qwen2", ConversionConfig(mixers=["full"]), None),
    "published form": ("qwen2", ConversionConfig(mixers=["gla", "swa"], sliding_window=7), "gla_swa"),
    "experts": ("qwen3_moe", ConversionConfig(mixers=["gla", "full"]), None),
    "own format": ("qwen3", ConversionConfig(mixers=["gla", "full"]), None),
}
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_of(base: Path, folder: Path, rank: int, targets: list[str] = TARGETS) -> torch.Tensor:
    """Save a random adapter of peft beside the model in ``base``; its logits."""
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = adapted.eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_of_peft_computes_the_same_here_and_comes_back_bit_for_bit(
    name: str,
    ranks: RankPool,
    hf_checkpoint: HFCheckpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    family, recipe, hf_format = BASES[name]
    source, _ = hf_checkpoint(family)
    import_checkpoint(source, tmp_path / "megatron", recipe)
    export_checkpoint(tmp_path / "megatron", tmp_path / "base", format_name=hf_format)
    expected = adapter_of(tmp_path / "base", tmp_path / "peft", rank=3)
    attach(tmp_path / "megatron", [tmp_path / "peft"], ["code"], tmp_path / "attached")
    (logits,) = ranks.run(megatron_logits, tmp_path / "attached", world_size=1, parallel=ParallelConfig())
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    (of_base,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ParallelConfig())
    assert (logits - of_base).abs().max() > 0.1 * expected.abs().max()

    detach(tmp_path / "attached", "code", tmp_path / "back", base=str(tmp_path / "base"))
    before = load_file(tmp_path / "peft/adapter_model.safetensors")
    after = load_file(tmp_path / "back/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, expected)

    # Merged weights are rounded once more, which logits show: the weights are compared, with peft's own.
    merge(tmp_path / "attached", tmp_path / "merged")
    export_checkpoint(tmp_path / "merged", tmp_path / "of_merged", format_name=hf_format)
    merged = again.merge_and_unload().state_dict()
    found = {
        key: value
        for file in (tmp_path / "of_merged").glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    assert found.keys() <= merged.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, merged[key], rtol=1e-6, atol=1e-6)
    (logits_of_merged,) = ranks.run(
        megatron_logits, tmp_path / "merged", world_size=1, parallel=ParallelConfig()
    )
    assert (logits_of_merged - logits).abs().max() <= 2e-5 * logits.abs().max()
    assert (logits_of_merged - of_base).abs().max() > 0.1 * expected.abs().max()

    report = export_checkpoint(tmp_path / "attached", tmp_path / "exported", format_name=hf_format)
    assert any("the base alone is written, without its adapters code" in note for note in report.notes)
    files = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert all(
        (tmp_path / "exported" / each).read_bytes() == (tmp_path / "base" / each).read_bytes()
        for each in files
    )


def test_two_adapters_at_once_are_the_sum_that_peft_computes(
    ranks: RankPool,
    hf_checkpoint: HFCheckpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    source, _ = hf_checkpoint("llama")
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig(mixers=["full"]))
    for name, rank in (("one", 2), ("two", 3)):
        adapter_of(source, tmp_path / name, rank)
    attach(tmp_path / "megatron", [tmp_path / "one", tmp_path / "two"], ["one", "two"], tmp_path / "both")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "one", adapter_name="one")
    adapted.load_adapter(tmp_path / "two", adapter_name="two")
    adapted.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        expected = adapted.eval()(TOKENS).logits
    (logits,) = ranks.run(megatron_logits, tmp_path / "both", world_size=1, parallel=ParallelConfig())
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rank", [None, 3], ids=["exact", "cut"])
def test_a_composed_adapter_is_the_one_that_peft_composes(
    rank: int | None,
    hf_checkpoint: HFCheckpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    source, _ = hf_checkpoint("llama")
    targets = {"one": TARGETS, "two": [*TARGETS[:3], "k_proj"]}  # neither stands beside all of the other's
    for name, own in (("one", 2), ("two", 3)):
        adapter_of(source, tmp_path / name, own, TARGETS if rank else targets[name])
    found, lost = compose([tmp_path / "one", tmp_path / "two"], [0.7, -0.4], tmp_path / "both", rank=rank)
    assert found == (rank or 5) and (lost == 0.0 if rank is None else 0.1 < lost < 0.9)

    def adapted(*folders: str) -> peft.PeftModel:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        both = peft.PeftModel.from_pretrained(model, tmp_path / folders[0], adapter_name=folders[0])
        for each in folders[1:]:
            both.load_adapter(tmp_path / each, adapter_name=each)
        return both.eval()

    theirs = adapted("one", "two")
    if rank is None:
        for each, weight in (("one", 0.7), ("two", -0.4)):
            for module in theirs.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer) and each in module.scaling:
                    module.scaling[each] *= weight
        theirs.base_model.set_adapter(["one", "two"])
    else:
        theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="svd", svd_rank=rank)
        theirs.set_adapter("sum")
    with torch.no_grad():
        expected, logits = theirs(TOKENS).logits, adapted("both")(TOKENS).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_composed_is_refused(
    hf_checkpoint: HFCheckpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    source, _ = hf_checkpoint("llama")
    other, _ = hf_checkpoint("llama", folder="other", intermediate_size=64)
    adapter_of(source, tmp_path / "one", 2)
    adapter_of(other, tmp_path / "two", 2)
    both = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(CheckpointError, match="two is an adapter of another model than .*one: beside"):
        compose(both, [1, 1], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="--weights has 1 numbers for 2 adapters"):
        compose(both, [1], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="--rank 5 must be from 1 to 4"):
        compose(both, [1, 1], tmp_path / "out", rank=5)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_of_the_model_is_refused(
    hf_checkpoint: HFCheckpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    source, _ = hf_checkpoint("llama")
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig(mixers=["full"]))
    adapter_of(source, tmp_path / "peft", 2)
    other, _ = hf_checkpoint("llama", folder="other", intermediate_size=64)
    adapter_of(other, tmp_path / "of_other", 2)

    def refused(folder: str, sentence: str, names: tuple[str, ...] = ("code",)) -> None:
        with pytest.raises((CheckpointError, ConfigurationError), match=sentence) as caught:
            attach(tmp_path / "megatron", [tmp_path / folder], names, tmp_path / "attached")
        assert "\n" not in str(caught.value)

    refused("of_other", "is an adapter of another model: .*has shape")
    refused("nowhere", "is no folder of a peft adapter")
    refused("peft", "--names has 2 names for 1 adapters", ("a", "b"))
    refused("peft", "name adapters by letters", ("a.b",))
    config = tmp_path / "peft/adapter_config.json"
    plain = json.loads(config.read_text())
    for change, sentence in (
        ({"r": 0}, "a rank is at least 1"),
        ({"use_dora": True}, "sets use_dora to True"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
    ):
        config.write_text(json.dumps(plain | change))
        refused("peft", sentence)
    config.write_text(json.dumps(plain))
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    renamed = {key.replace("q_proj", "embed_tokens"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "peft/adapter_model.safetensors")
    refused("peft", "adapts embed_tokens; adapters here stand beside q_proj")
    with pytest.raises(ConfigurationError, match="--name code is no adapter of .*, which has none"):
        detach(tmp_path / "megatron", "code", tmp_path / "out")
