"""Sources with other activations than silu, and recipes that put another one in its place.

Bound of logits: 2e-4 on float32 logits of order 1-10, as in test_logits.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_conversion, load_model_config
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.hf import SPARSE_LLAMA_CODE
from tests.conversion.hf_models import HFCheckpoint, all_tensors
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed.pool import RankPool
from tests.hf.test_exported_folder import check_that_a_folder_stands_alone

TOLERANCE = 2e-4
THRESHOLD = 0.3
"""Of gates of about 1: without it logits differ."""
ONE_RANK = ParallelConfig()


def stored(folder: Path) -> ModelConfig:
    return load_model_config(folder / "iter_0000000/model_config.yaml")


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def with_activation(folder: Path, name: str, act_fn: torch.nn.Module | None = None) -> PreTrainedModel:
    """transformers' own class with a folder's weights and another ``hidden_act``, or a function for it."""
    config = AutoConfig.from_pretrained(folder)
    config.hidden_act = name
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    for layer in model.model.layers if act_fn is not None else ():
        layer.mlp.act_fn = act_fn
    return model


class ByHand(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x >= THRESHOLD)


def check_difference(found: torch.Tensor, expected: torch.Tensor, other: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE
    assert (other - expected).abs().max() > 0.1  # the activation shows


@pytest.mark.parametrize(
    ("family", "activation"),
    [
        *((family, "relu") for family in ("llama", "biased_llama", "mistral", "qwen2", "qwen3", "qwen3_moe")),
        *((family, "relu2") for family in ("llama", "qwen3_moe")),
    ],
)
def test_a_source_with_relu_computes_what_transformers_computes_and_goes_back_as_it_came(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, activation: str
) -> None:
    source, model = hf_checkpoint(family, hidden_act=activation)
    report = import_checkpoint(source, tmp_path / "megatron")
    assert stored(tmp_path / "megatron").activation_func is ActivationFunc(activation)
    assert activation in report.layers
    (found,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    check_difference(found, logits_of(model), logits_of(with_activation(source, "silu")))
    export_checkpoint(tmp_path / "megatron", tmp_path / "again")
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    assert now == was
    ours, theirs = all_tensors(tmp_path / "again"), all_tensors(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(pipeline_model_parallel_size=2)],
    ids=["TP 2", "PP 2"],
)
def test_relu_on_two_ranks(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, parallel: ParallelConfig
) -> None:
    source, model = hf_checkpoint("llama", hidden_act="relu")
    import_checkpoint(source, tmp_path / "megatron")
    found = ranks.run(megatron_logits, tmp_path / "megatron", world_size=2, parallel=parallel)
    for logits in found:
        if logits is not None:
            assert (logits - logits_of(model)).abs().max() <= TOLERANCE


def test_a_recipe_puts_relu_in_the_place_of_silu(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """The export is transformers' own Llama, whose config.json says relu."""
    source, model = hf_checkpoint("llama")
    report = import_checkpoint(source, tmp_path / "megatron", load_conversion("prosparse", []))
    assert any("relu where the source's compute silu" in note for note in report.notes)
    (found,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    check_difference(found, logits_of(with_activation(source, "relu")), logits_of(model))
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert type(exported) is LlamaForCausalLM and exported.config.hidden_act == "relu"
    assert (logits_of(exported) - found).abs().max() <= TOLERANCE
    ours, theirs = all_tensors(tmp_path / "export"), all_tensors(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fatrelu_is_exported_with_code_for_it_and_comes_back(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("llama", hidden_act="relu")
    recipe = ConversionConfig(
        mixers=["full"], activation_func=ActivationFunc.fatrelu, fatrelu_threshold=THRESHOLD
    )
    report = import_checkpoint(source, tmp_path / "megatron", recipe)
    assert f"fatrelu {THRESHOLD}" in report.layers
    (found,) = ranks.run(megatron_logits, tmp_path / "megatron", world_size=1, parallel=ONE_RANK)
    by_hand = with_activation(source, "relu", ByHand())
    check_difference(found, logits_of(by_hand), logits_of(with_activation(source, "relu")))

    export = export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    assert any("trust_remote_code=True" in note for note in export.notes)
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32
    )
    assert (logits_of(exported) - found).abs().max() <= TOLERANCE
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("sparsellama", "fatrelu")
    assert config["hidden_act_param"] == THRESHOLD
    check_that_a_folder_stands_alone(exported, tmp_path / "export", SPARSE_LLAMA_CODE, tmp_path)

    import_checkpoint(tmp_path / "export", tmp_path / "again")
    first, second = stored(tmp_path / "megatron"), stored(tmp_path / "again")
    assert first == second
    export_checkpoint(tmp_path / "again", tmp_path / "twice")
    ours, theirs = all_tensors(tmp_path / "twice"), all_tensors(tmp_path / "export")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "twice/config.json").read_text()) == config


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_a_recipe_that_names_no_activation_keeps_the_sources(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, activation: str
) -> None:
    """Hybrids are exported in this project's own format, whose code and config say so."""
    source, _ = hf_checkpoint("qwen2", hidden_act=activation)
    import_checkpoint(source, tmp_path / "hybrid", ConversionConfig(mixers=["gla", "swa"]))
    assert stored(tmp_path / "hybrid").activation_func is ActivationFunc(activation)
    export_checkpoint(tmp_path / "hybrid", tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("spikingbrain", activation)
    (found,) = ranks.run(megatron_logits, tmp_path / "hybrid", world_size=1, parallel=ONE_RANK)
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32
    )
    assert (logits_of(exported) - found).abs().max() <= TOLERANCE
    with pytest.raises(CheckpointError, match=r"gla_swa cannot hold .*activation_func=relu"):
        export_checkpoint(tmp_path / "hybrid", tmp_path / "no", format_name="gla_swa")


def test_a_recipe_swaps_the_activation_of_experts_too(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("qwen3_moe")
    recipe = ConversionConfig(keep_mixers=True, activation_func=ActivationFunc.relu)
    import_checkpoint(source, tmp_path / "megatron", recipe)
    assert stored(tmp_path / "megatron").activation_func is ActivationFunc.relu


def test_a_threshold_that_cannot_be_is_refused(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    below = ConversionConfig(activation_func=ActivationFunc.fatrelu, fatrelu_threshold=-0.1)
    with pytest.raises(ConfigurationError, match=r"fatrelu_threshold=-0\.1 must be at least 0"):
        import_checkpoint(source, tmp_path / "out", below)
    stray = ConversionConfig(activation_func=ActivationFunc.relu, fatrelu_threshold=0.1)
    with pytest.raises(ConfigurationError, match="has no part in activation_func=relu"):
        import_checkpoint(source, tmp_path / "out", stray)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "fatrelu"}, "hidden_act = .*fatrelu.* is not supported"),
        ({"hidden_act": ["relu"]}, "hidden_act = .* is not supported"),
        (
            {"architectures": ["SparseLlamaForCausalLM"], "hidden_act": "fatrelu"},
            "hidden_act_param is missing",
        ),
        (
            {
                "architectures": ["SparseLlamaForCausalLM"],
                "hidden_act": "fatrelu",
                "hidden_act_param": -1,
            },
            "hidden_act_param = -1 must be a number of at least 0",
        ),
        ({"architectures": ["SparseLlamaForCausalLM"], "hidden_act": "silu"}, "hidden_act .* not supported"),
    ],
    ids=["fatrelu in Llama", "a list", "no threshold", "threshold below 0", "silu in SparseLlama"],
)
def test_a_config_that_no_model_computes_is_refused(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source, _ = hf_checkpoint("llama")
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(source, tmp_path / "out")
