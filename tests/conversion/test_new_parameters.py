"""What a swap adds: which parameters, which values, and what the report says about them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import GatedLinearAttentionConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from tests.conversion.hf_models import HFCheckpoint

ATTENTION = "decoder.layers.{layer}.self_attention."


def convert(source: Path, output: Path, **recipe: object) -> MegatronCheckpointReader:
    import_checkpoint(source, output, ConversionConfig(**recipe))  # type: ignore[arg-type]
    return MegatronCheckpointReader(output / "iter_0000000")


def test_only_gla_layers_get_new_parameters(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("qwen2")
    dense = convert(source, tmp_path / "dense", mixers=["full"])
    hybrid = convert(source, tmp_path / "hybrid", mixers=["gla", "swa"])
    names = ("linear_gate_down_proj.weight", "linear_gate_up_proj.weight", "linear_gate_up_proj.bias")
    assert hybrid.tensors.keys() - dense.tensors.keys() == {
        ATTENTION.format(layer=layer) + name for layer in (0, 2) for name in (*names, "out_norm.weight")
    }
    for name in dense.tensors:
        assert torch.equal(dense.read(name), hybrid.read(name)), name


def test_values_follow_the_recipe(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(dtype=torch.bfloat16, hidden_size=256)
    gla = GatedLinearAttentionConfig(
        gate_low_rank_dim=64,
        init_gate_bias_min=-7.0,
        init_gate_bias_max=0.5,
        init_gate_std=0.05,
        init_out_norm=0.25,
    )
    reader = convert(source, tmp_path / "out", mixers=["gla"], gla=gla)
    attention = ATTENTION.format(layer=3)
    down = reader.read(attention + "linear_gate_down_proj.weight")
    assert down.dtype == torch.bfloat16  # as the projections around it
    assert down.shape == (64, 256)
    assert abs(down.float().std().item() - 0.05) < 0.003  # 16384 samples: 5 standard errors are 0.0014
    spread = torch.linspace(-7.0, 0.5, 64).repeat(2)  # the channels of a head, in each of the 2 groups
    bias = reader.read(attention + "linear_gate_up_proj.bias")
    assert torch.allclose(bias.float(), spread, atol=0.02)  # half a unit of bfloat16 below 8 is 0.0156
    assert torch.all(reader.read(attention + "out_norm.weight") == 0.25)


def test_gates_without_noise(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    gla = GatedLinearAttentionConfig(init_gate_std=0.0)
    reader = convert(source, tmp_path / "out", mixers=["gla"], gla=gla)
    down = reader.read(ATTENTION.format(layer=0) + "linear_gate_down_proj.weight")
    assert torch.equal(down, torch.zeros(16, 32))


def test_seed_and_name_decide_the_values(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    """A deeper model, another pattern and another family draw the same values for the same parameter."""
    name = ATTENTION.format(layer=2) + "linear_gate_down_proj.weight"
    first, _ = hf_checkpoint(folder="first")
    second, _ = hf_checkpoint("qwen2", folder="second", num_hidden_layers=6)
    value = convert(first, tmp_path / "a", mixers=["gla", "swa"]).read(name)
    assert torch.equal(convert(second, tmp_path / "b", mixers=["gla"]).read(name), value)
    other_seed = convert(first, tmp_path / "c", mixers=["gla"], seed=7)
    assert not torch.equal(other_seed.read(name), value)
    other_layer = name.replace("layers.2", "layers.1")
    assert not torch.equal(convert(second, tmp_path / "d", mixers=["gla"]).read(other_layer), value)


def test_report_counts_every_parameter(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, model = hf_checkpoint("qwen3")
    report = import_checkpoint(source, tmp_path / "out", ConversionConfig())
    copied = sum(group.parameters for group in report.groups if group.origin == "copied")
    assert copied == sum(parameter.numel() for parameter in model.parameters())
    # Per GLA layer: W1 16 x 32, W2 32 x 16, b2 32, norm 16.
    assert report.new_parameters == 2 * (16 * 32 + 32 * 16 + 32 + 16)
    saved = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert saved["new_parameters"] == report.new_parameters
    assert {
        "name": "GLA gate b2",
        "origin": "new: from -16 to 4 over the channels of each head",
        "tensors": 2,
        "parameters": 64,
    } in saved["groups"]
    table = report.table()
    assert "2 gla + 2 swa (window 4096) layers" in table
    assert f"{100 * report.new_parameters / report.parameters:.3g} % new" in table


def test_dry_run_reports_the_same_and_writes_nothing(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint()
    planned = import_checkpoint(source, tmp_path / "out", ConversionConfig(), dry_run=True)
    assert not (tmp_path / "out").exists()
    done = import_checkpoint(source, tmp_path / "out", ConversionConfig())
    assert (planned.groups, planned.bytes) == (done.groups, done.bytes)
    assert "would write" in planned.table()


@dataclass(frozen=True)
class Orthogonal:
    """An initializer that conversion does not know."""


@pytest.mark.parametrize(
    ("role", "changes", "sentence"),
    [
        (
            "out_norm",
            {"init": None},
            r"out_norm\.weight is made of out_norm, which the source does not have",
        ),
        (
            "out_norm",
            {"init": Orthogonal()},
            r"is initialized by Orthogonal, which .* does not know; known are Normal,",
        ),
        (
            "o_weight",
            {"shapes": ((8, 32),)},
            r"linear_proj\.weight is made of model\.layers\.0\.self_attn\.o_proj\.weight, whose shape is "
            r"\[32, 32\], not \[8, 32\]",
        ),
    ],
    ids=["no initializer", "unknown initializer", "other shape"],
)
def test_a_weight_that_nothing_fills_is_refused_by_name(
    hf_checkpoint: HFCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    changes: dict,
    sentence: str,
) -> None:
    kind = MIXERS["gla"]
    own = kind.weights

    def changed(model, group="attention"):
        return tuple(replace(w, **changes) if w.roles == (role,) else w for w in own(model, group))

    monkeypatch.setattr(kind, "weights", changed)
    source, _ = hf_checkpoint()
    with pytest.raises(ConfigurationError, match=sentence):
        import_checkpoint(source, tmp_path / "out", ConversionConfig())
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_new_layers_do_without_are_told(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = MIXERS["gla"]
    own = kind.weights

    def without_norms(model, group="attention"):
        return tuple(weight for weight in own(model, group) if weight.roles != ("k_norm",))

    monkeypatch.setattr(kind, "weights", without_norms)
    source, _ = hf_checkpoint("qwen3")
    report = import_checkpoint(source, tmp_path / "out", ConversionConfig(), dry_run=True)
    name = "model.layers.0.self_attn.k_norm.weight"
    assert report.ignored == [f"2 tensors such as {name}, which have no part in the new layers"]
