"""An exported folder needs torch and transformers only; published config files load unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.conversion.export_code import code_of_export
from spikingbrain_train.hf import GLA_SWA_CODE, SPIKINGBRAIN_CODE, Code
from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM

PUBLISHED_7B = {
    "architectures": ["GLAswaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layers": list(range(1, 28, 2)),
    "attn_mode": "chunk",
    "auto_map": {
        "AutoConfig": "configuration_gla_swa.GLAswaConfig",
        "AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM",
    },
    "bos_token_id": 151643,
    "conv_size": 4,
    "elementwise_affine": True,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "hidden_act": "swish",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "model_type": "gla_swa",
    "norm_eps": 1e-06,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_short_conv": False,
    "vocab_size": 152064,
}

# Runs where nothing of the project can be imported: loads, computes, generates, trains a step, saves again.
STANDALONE_SCRIPT = """
import sys
sys.modules["spikingbrain_train"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(60).view(2, 30)
with torch.no_grad():
    logits = model(ids).logits
generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
loss = model.train()(ids, labels=ids).loss
loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval().save_pretrained(out + "/saved")
again = AutoModelForCausalLM.from_pretrained(out + "/saved", trust_remote_code=True)
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
result = {"logits": logits, "generated": generated, "same": torch.tensor(same)}
torch.save(result, out + "/result.pt")
"""


def export(model: GLAswaForCausalLM, folder: Path) -> None:
    """What the exporter does: tensors, config with auto_map, copies of the modelling files."""
    model.config.architectures = GLA_SWA_CODE.architectures
    model.config.auto_map = GLA_SWA_CODE.auto_map
    model.save_pretrained(folder)
    for file in GLA_SWA_CODE.files:
        shutil.copy(file, folder)


def run_where_the_project_is_not(script: str, folder: Path, place: Path) -> None:
    """Run a script with two folders as arguments, without network; a cache of the hub lies in the second."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    # Dependencies may come from PYTHONPATH too; only the project itself must not.
    root = str(Path(__file__).resolve().parents[2])
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != "." and p != root]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", script, str(folder), str(place)]
    subprocess.run(command, cwd=place, env=environment, check=True, timeout=240)


def check_that_a_folder_stands_alone(model: PreTrainedModel, folder: Path, code: Code, place: Path) -> None:
    """It loads, computes, generates, trains and saves where nothing of the project can be imported."""
    run_where_the_project_is_not(STANDALONE_SCRIPT, folder, place)
    result = torch.load(place / "result.pt", weights_only=True)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model(ids).logits, rtol=0, atol=1e-6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(result["generated"], expected)
    assert result["same"]
    saved_again = json.loads((place / "saved" / "config.json").read_text())
    assert saved_again["auto_map"] == code.auto_map


@pytest.mark.parametrize("tied", [False, True])
def test_folder_loads_computes_generates_and_trains_on_its_own(
    random_model: Callable, tmp_path: Path, tied: bool
) -> None:
    model = random_model(tie_word_embeddings=tied, attention_bias=not tied)
    folder = tmp_path / "export"
    export(model, folder)
    check_that_a_folder_stands_alone(model, folder, GLA_SWA_CODE, tmp_path)


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        (GLA_SWA_CODE, []),
        (SPIKINGBRAIN_CODE, []),
        (SPIKINGBRAIN_CODE, ["dense"]),
        (SPIKINGBRAIN_CODE, ["gla", "moe"]),
        (SPIKINGBRAIN_CODE, ["full", "swa", "dense"]),
    ],
    ids=lambda each: "-".join(each if isinstance(each, list) else each.architectures) or "no kinds",
)
def test_the_modelling_file_names_every_other_file(code: Code, kinds: list[str]) -> None:
    """transformers 4.5x puts no others where it imports the code from."""
    found = [registry[name] for name in kinds for registry in (MIXERS, FEED_FORWARDS) if name in registry]
    texts = code_of_export(code, found)
    (own,) = (name for name in texts if name.startswith("modeling"))
    imported = re.findall(r"^from \.(\w+) import", texts[own], re.MULTILINE)
    assert sorted([*imported, own.removesuffix(".py")]) == sorted(name.removesuffix(".py") for name in texts)
    assert len(texts) == len(code.files) + len({kind.export_module for kind in found})


def test_tensor_names_are_the_published_ones(random_model: Callable, tmp_path: Path) -> None:
    random_model(num_hidden_layers=2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for layer in (0, 1):
        names = ["attn_norm.weight", "attn.o_proj.weight", "mlp_norm.weight"]
        names += [f"attn.{n}_proj.{kind}" for n in "qkv" for kind in ("weight", "bias")]
        names += [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
        expected |= {f"model.layers.{layer}.{name}" for name in names}
    gate = ["gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias", "g_norm.weight"]
    expected |= {f"model.layers.0.attn.{name}" for name in gate}
    assert set(tensors) == expected
    assert tensors["model.layers.0.attn.gk_proj.0.weight"].shape == (16, 32)
    assert tensors["model.layers.0.attn.gk_proj.1.weight"].shape == (2 * 8, 16)
    assert tensors["model.layers.0.attn.g_norm.weight"].shape == (8,)


def test_tied_output_is_stored_once(random_model: Callable, tmp_path: Path) -> None:
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = GLAswaForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embeddings.weight


def test_published_config_loads_and_saves_every_key_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_7B))
    config = GLAswaConfig.from_pretrained(tmp_path)
    assert config.head_dim == 128
    assert [config.mixer_type(i) for i in range(28)] == ["gla", "swa"] * 14
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: saved.get(key) for key in PUBLISHED_7B} == PUBLISHED_7B


def test_published_7b_has_the_published_size() -> None:
    with torch.device("meta"):
        model = GLAswaForCausalLM(GLAswaConfig(**PUBLISHED_7B))
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    # Qwen2.5-7B has 7,615,616,512 parameters; 14 GLA layers add their gate and output norm.
    gate = 16 * 3584 + 512 * 16 + 512 + 128
    assert sum(parameters.values()) == 7_615_616_512 + 14 * gate


def test_rope_scaling_and_layer_lists_survive_saving(tiny_config: Callable, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny_config(rope_scaling=scaling, attn_layers=[3, 0], full_attention_layers=[0], head_dim=16)
    config.save_pretrained(tmp_path)
    again = GLAswaConfig.from_pretrained(tmp_path)
    assert again.rope_scaling == scaling
    assert [again.mixer_type(i) for i in range(4)] == ["full", "gla", "gla", "swa"]
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"linear_num_key_value_heads": 3}, "must be a multiple of linear_num_key_value_heads 3"),
        ({"linear_gate": "tied"}, 'linear_gate must be "low_rank", "full_rank" or "fixed", got "tied"'),
        ({"hidden_size": 34}, "hidden_size 34 is not divisible by num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"attn_layers": [4]}, r"attn_layers names layers \[4\]"),
        ({"full_attention_layers": [2]}, r"full_attention_layers \[2\] must also be listed in attn_layers"),
        ({"use_short_conv": True}, "use_short_conv must be false"),
        ({"elementwise_affine": False}, "elementwise_affine must be true"),
        ({"quant_weight_group_size": 128}, "W8ASpike"),
        ({"rope_scaling": {"rope_type": "proportional"}}, 'rope_type "proportional" is not supported'),
        ({"rope_scaling": {"rope_type": "linear"}}, 'rope_parameters of type "linear" need factor'),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(
    tiny_config: Callable, changes: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**changes)


def test_windows_that_contradict_each_other_are_refused(tiny_config: Callable, tmp_path: Path) -> None:
    """Also where one of them is changed later: the model would go on with the other."""
    with pytest.raises(ValueError, match="sliding_window 3 contradicts attention_window 9"):
        GLAswaConfig(sliding_window=3, attention_window=9)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window 3 contradicts attention_window 7"):
        GLAswaConfig.from_pretrained(tmp_path, sliding_window=3)
    changed = GLAswaConfig.from_pretrained(tmp_path, sliding_window=3, attention_window=4)
    assert (changed.sliding_window, changed.attention_window) == (3, 4)
    changed.attention_window = None
    with pytest.raises(ValueError, match="attention_window is null, but sliding_window 3"):
        GLAswaForCausalLM(changed)
