"""A SpikingBrain2.0 folder is read as far as the kinds here go, and what has no place is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spikingbrain_train.conversion.command_line import convert_checkpoint
from spikingbrain_train.conversion.formats.sse_swa_moba import SpikingBrain2
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.conversion.inspect_spikingbrain2 import SpikingBrain2Inspection
from tests.conversion.test_tools import failure

ATTENTION = {
    "full_layers": [5],
    "layers": [0, 1, 5],
    "moba_chunk_size": 512,
    "moba_topk": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "qk_norm": True,
    "qkv_bias": False,
    "rope_theta": 5000000,
    "window_size": 128,
}
CONFIG = {
    "architectures": ["SSESWAMoBAForCausalLM"],
    "model_type": "sse_swa_moba",
    "attn": ATTENTION,
    "head_dim": 8,
    "hidden_act": "swish",
    "hidden_size": 20,
    "intermediate_size": 48,
    "linear_attn_type": "gdn",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-06,
    "num_heads": 4,
    "num_hidden_layers": 6,
    "num_reader": 2,
    "num_sparse_partition": 4,
    "num_writer": 2,
    "tie_word_embeddings": True,
    "use_output_gate": False,
    "use_short_conv": False,
    "vocab_size": 100,
}
SSE = [2, 3, 4]
OF_SSE = [
    "A_log",
    "dt_bias",
    "sse_a_proj.weight",
    "sse_b_proj.weight",
    "sse_e_proj.weight",
    "sse_q_proj.weight",
    "sse_k_proj.weight",
    "sse_v_proj.weight",
    "lora_q_proj.0.weight",
    "lora_q_proj.1.weight",
    "lora_k_proj.0.weight",
    "lora_k_proj.1.weight",
    "sse_o_norm.weight",
    "sse_o_proj.weight",
    "sse_merge_norm.weight",
]
"""As the published module names them (SSEGDNH), without output gate and short convolution."""


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A small one in its published layout; keyword arguments replace keys, ``change`` edits the tensors."""

    def make(change: Callable[[dict], object] = lambda tensors: None, **keys: object) -> Path:
        config = CONFIG | keys
        path = tmp_path / "spikingbrain2"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        model = SpikingBrain2.read(config, path / "config.json")
        tensors = {tensor.name: torch.zeros(tensor.shape) for tensor in model.tensors()}
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def test_every_tensor_is_told(folder: Callable[..., Path]) -> None:
    found = inspect_checkpoint(folder())
    assert isinstance(found, SpikingBrain2Inspection)
    named = {f"model.layers.{layer}.attn.{name}" for layer in SSE for name in OF_SSE}
    assert {tensor.name for tensor in found.missing} == named
    assert not found.absent and not found.unknown
    held = {tensor.name: tensor for tensor in found.held}
    assert held["model.layers.0.attn.k_norm.weight"].what == "full attention up to 2,048 tokens"
    assert held["model.layers.5.attn.q_proj.weight"].what == "full attention"
    assert held["model.layers.2.attn.swa_v_proj.weight"].shape == (16, 20)
    assert "model.layers.2.attn.swa_merge_norm.weight" in held and "model.layers.3.mlp.up_proj.weight" in held
    assert len(held) == 2 + 6 * 5 + 3 * 6 + 3 * 7
    text = found.text(width=100)
    assert "of 116 tensors 45 have no place here" in text
    assert all(name in text for name in OF_SSE) and "2-4" in text
    listed = found.table("*.layers.2.attn.sse_?_proj.weight")
    assert listed.count("has none") == 7 and "layers.3" not in listed
    told = found.values()
    assert {tensor["name"] for tensor in told["missing"]} == named and not told["importable"]


def test_other_forms_of_its_layers(folder: Callable[..., Path]) -> None:
    found = inspect_checkpoint(
        folder(linear_attn_type="gla", use_output_gate=True, use_short_conv=True, tie_word_embeddings=False)
    )
    assert isinstance(found, SpikingBrain2Inspection)
    names = {tensor.name.partition("attn.")[2] for tensor in found.missing if tensor.layer == 2}
    assert {"sse_gk_proj.1.1.bias", "sse_g_proj.0.weight", "q_conv1d_shared.weight"} <= names
    assert "A_log" not in names and "lm_head.weight" in {tensor.name for tensor in found.held}


def test_tensors_that_do_not_fit_are_told(folder: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.attn.sse_q_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(3)
        tensors["model.layers.0.attn.extra"] = torch.zeros(1)

    found = inspect_checkpoint(folder(change))
    assert isinstance(found, SpikingBrain2Inspection)
    absent = [tensor.name for tensor in found.absent]
    assert absent == ["model.layers.2.attn.sse_q_proj.weight", "model.norm.weight"]
    assert [spec.name for spec in found.unknown] == ["model.layers.0.attn.extra"]
    assert "model.layers.0.attn.extra" in found.text()


def test_an_import_is_refused_in_a_sentence(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder()
    said = failure(capsys, "import", "--hf", path, "--output", tmp_path / "out")
    assert (
        "is SpikingBrain2.0, of which 45 of 116 tensors, such as model.layers.2.attn.sse_q_proj.weight, have "
        "no place here: no kind of layer computes state expansion on a gated delta rule (3 layers)" in said
    )
    assert f"`spikingbrain-convert inspect {path}` says where each would go, and which would not" in said
    assert not (tmp_path / "out").exists()
    convert_checkpoint(["inspect", str(path)])
    assert "SSESWAMoBAForCausalLM (SpikingBrain2.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"attn": None}, "attn = null must describe the softmax layers"),
        ({"attn": ATTENTION | {"layers": [6]}}, "layers = [6] must list 0-based layer indices below"),
        ({"linear_attn_type": "mamba"}, 'linear_attn_type = "mamba" must be one of gdn, gla'),
        ({"head_dim": 0}, "head_dim = 0 must be a whole number of at least 1"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_a_malformed_config_is_named(
    keys: dict, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | keys))
    save_file({"x": torch.zeros(1)}, path / "model.safetensors")
    said = failure(capsys, "inspect", path)
    assert sentence in said and str(path / "config.json") in said
