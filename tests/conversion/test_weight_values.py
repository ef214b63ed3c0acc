"""Weights that no trained model has are refused in both directions, and sizes are not believed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion.command_line import convert_checkpoint
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.conversion.weight_values import fault_of
from spikingbrain_train.errors import CheckpointError
from tests.conversion.hf_models import HFCheckpoint, all_tensors

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 5)])
def test_the_first_bad_number_is_named(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.linspace(-1, 1, 60)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    assert fault_of(values, may_be_zero=False) is None
    index = [size - 1 for size in shape]
    for bad, words in (
        (float("nan"), "holds NaN"),
        (float("inf"), "an infinity"),
        (-float("inf"), "an infinity"),
    ):
        damaged = values.clone()
        damaged[tuple(index)] = bad
        assert (
            fault_of(damaged, may_be_zero=True) == f"holds {words.removeprefix('holds ')} (first at {index})"
        )
    assert fault_of(torch.zeros(shape, dtype=dtype), may_be_zero=False) == "holds nothing but zeros"
    assert fault_of(-torch.zeros(shape, dtype=dtype), may_be_zero=True) is None
    assert fault_of(torch.full(shape, torch.finfo(dtype).max, dtype=dtype), may_be_zero=False) is None


def damage(source: Path, name: str, value: float, *, everywhere: bool = False) -> None:
    tensors = all_tensors(source)
    tensors[name].view(-1)[0 if not everywhere else slice(None)] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "everywhere", "words"),
    [
        (UP, float("nan"), False, r"holds NaN \(first at \[0, 0\]\)"),
        ("model.norm.weight", float("inf"), False, "holds an infinity .*"),
        ("model.layers.0.self_attn.q_proj.bias", -float("inf"), False, "holds an infinity .*"),
        ("model.embed_tokens.weight", 0.0, True, "holds nothing but zeros"),
        ("model.layers.0.input_layernorm.weight", 0.0, True, "holds nothing but zeros"),
    ],
)
def test_damaged_weights_are_refused_or_imported_with_a_note(
    hf_checkpoint: HFCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: float,
    everywhere: bool,
    words: str,
) -> None:
    source, _ = hf_checkpoint("qwen2", **SMALL)
    damage(source, name, value, everywhere=everywhere)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} {words}; copy the file again"):
        import_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    command = ["import", "--hf", str(source), "--output", str(tmp_path / "out"), "--allow-damaged-weights"]
    convert_checkpoint(command)
    assert f"note: {name} holds" in capsys.readouterr().out
    export_checkpoint(tmp_path / "out", tmp_path / "back", allow_damaged_weights=True)
    torch.testing.assert_close(
        all_tensors(tmp_path / "back")[name], all_tensors(source)[name], equal_nan=True
    )


def test_biases_of_zeros_are_ordinary(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("qwen2", **SMALL)
    damage(source, "model.layers.0.self_attn.q_proj.bias", 0.0, everywhere=True)
    assert not any("zeros" in note for note in import_checkpoint(source, tmp_path / "out").notes)


def test_a_recipe_may_start_gates_at_zero(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    recipe = ConversionConfig()
    recipe.gla.init_gate_std = recipe.gla.init_out_norm = 0.0
    import_checkpoint(source, tmp_path / "hybrid", recipe)
    export_checkpoint(tmp_path / "hybrid", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "again")


def test_an_export_with_nan_is_refused_or_made_with_a_note(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    damage(source, UP, float("nan"))
    import_checkpoint(source, tmp_path / "megatron", allow_damaged_weights=True)
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight holds NaN"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "out", allow_damaged_weights=True)
    assert any("holds NaN" in note and "copied as they are" in note for note in report.notes)


def test_numbers_that_a_narrower_format_cannot_hold_are_refused(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    damage(source, UP, 3e38)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "wide", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"an infinity .*float16, whose largest number is 65504"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", dtype=torch.float16)


def refused_at_once(read: Callable[[], object], setting: str) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=f"{setting} = 1000000000, but .* of 2 layers"):
        read()
    assert time.monotonic() - started < 2.0


def test_a_claimed_number_of_layers_is_held_against_the_tensors_at_once(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    """Listing a billion layers takes minutes and the machine's memory."""
    llama, _ = hf_checkpoint(**SMALL)
    import_checkpoint(llama, tmp_path / "megatron", ConversionConfig())
    export_checkpoint(tmp_path / "megatron", tmp_path / "hybrid")
    for folder, change in (
        (llama, {}),
        (tmp_path / "hybrid", {}),
        (tmp_path / "hybrid", {"attn_layers": None}),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change | {"num_hidden_layers": 10**9}))
        refused_at_once(partial(import_checkpoint, folder, tmp_path / "out"), "num_hidden_layers")
        refused_at_once(partial(inspect_checkpoint, folder), "num_hidden_layers")
    path = tmp_path / "megatron/iter_0000000/model_config.yaml"
    path.write_text(path.read_text().replace("num_layers: 2", "num_layers: 1000000000"))
    refused_at_once(partial(export_checkpoint, tmp_path / "megatron", tmp_path / "out"), "num_layers")
    refused_at_once(partial(inspect_checkpoint, tmp_path / "megatron"), "num_layers")
