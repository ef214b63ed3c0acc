"""spikingbrain-quantize on a small hybrid: what it writes is what it measured, and real INT8 numbers."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.safetensors_io import SafetensorsWriter
from spikingbrain_train.data.preprocess import PreprocessOptions, preprocess
from spikingbrain_train.evaluation.command_line import evaluate
from spikingbrain_train.quantization import report as quantization_report
from spikingbrain_train.quantization.command_line import quantize
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE
from tests.small_source import save_small_source

GROUP = "16"
INT8_NAMES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("lm_head", "embeddings"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its hybrid as a checkpoint and as an export, and text."""
    folder = tmp_path_factory.mktemp("hybrid")
    source = save_small_source(folder / "source")
    recipe = ConversionConfig(mixers=["gla", "swa", "gla", "full"], sliding_window=7)
    import_checkpoint(source, folder / "checkpoint", recipe)
    export_checkpoint(folder / "checkpoint", folder / "export")
    for name in ("assignment", "with"):
        (folder / f"{name}.txt").write_text(topics[name])
        preprocess(PreprocessOptions([str(folder / f"{name}.txt")], str(folder / name), str(source)))
    return folder


def run(folder: Path, output: Path, *words: str, model: str = "export", samples: int = 8) -> dict[str, Any]:
    """The command on a folder; its report."""
    quantize(
        [
            *("--model", str(folder / model), "--output", str(output), "--trust-remote-code"),
            *("--calibration-data", str(folder / "with"), "--samples", str(samples), "--seq-length", "32"),
            *("--device", "cpu", "--dtype", "float32", *words),
        ]
    )
    found = output / "quantization.json"
    return json.loads(found.read_text()) if found.exists() else {}


def cross_entropy(folder: Path, result: Path, *held_out: str) -> float:
    words = ["--model", str(folder), *held_out, "--seq-length", "32", "--trust-remote-code"]
    evaluate([*words, "--output", str(result), "--device", "cpu", "--dtype", "float32"])
    return float(json.loads(result.read_text())["cross_entropy"])


def test_what_is_written_is_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int8"
    held_out = ("--data", str(folder / "assignment"), "--max-windows", "4")
    report = run(folder, output, "--group-size", GROUP, "--method", "gptq", *held_out)
    printed = capsys.readouterr().out
    assert [each["what"] for each in report["measured"]] == [
        "as it is",
        "INT8 weights, plain rounding",
        "INT8 weights, GPTQ",
        "+ spikes with k 3",
        "+ INT8 keys and values",
        "+ INT8 embedding and output layer",
    ]
    assert all(each["what"] in printed for each in report["measured"])
    first, *_, last = (each["cross_entropy"] for each in report["measured"])
    assert cross_entropy(folder / "export", tmp_path / "a.json", *held_out) == pytest.approx(first, abs=1e-6)
    assert cross_entropy(output, tmp_path / "b.json", *held_out) == pytest.approx(last, abs=1e-4)
    assert len(report["layers"]) == 4
    assert all(each["gptq"] < each["plain"] < 0.05 for each in report["layers"])
    assert (output / "quantization.png").stat().st_size > 1000

    weights = load_file(output / "model.safetensors")
    before = load_file(folder / "export/model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(".weight") and name.split(".")[-2] in INT8_NAMES:
            scale = weights[f"{name}_scale"]
            assert tensor.dtype == torch.int8 and scale.dtype == torch.bfloat16
            width = tensor.shape[1] // scale.shape[1]
            restored = tensor.float() * scale.float().repeat_interleave(width, 1)
            assert (restored - before[name]).norm() < 0.02 * before[name].norm(), name
        elif not name.endswith(".weight_scale") and "gk_proj" not in name:
            assert torch.equal(tensor, before[name]), name


def test_a_checkpoint_that_was_trained_with_int8_weights_brings_its_settings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    path = next((folder / "checkpoint").rglob(MODEL_CONFIG_FILE))
    text = path.read_text()
    model = OmegaConf.create(text)
    model.quantization = {"projections": ["qkv", "mlp_fc1"], "group_size": 32, "keys_and_values": True}
    model.spiking = {"projections": ["mlp_fc1"], "k": 5.0}
    path.write_text(OmegaConf.to_yaml(model))
    try:
        run(folder, tmp_path / "out", "--dry-run", model="checkpoint")
    finally:
        path.write_text(text)
    printed = capsys.readouterr().out
    for words in (
        "INT8, a scale for 32 neighbours along the input, plain, largest scales",
        "read spikes    gate_proj, up_proj",
        "k 5",
    ):
        assert words in printed
    assert not (tmp_path / "out").exists()


def test_a_megatron_checkpoint_needs_no_export(folder: Path, tmp_path: Path) -> None:
    options = ("--group-size", "row", "--float-keys-and-values", "--float-embeddings", "--spikes", "none")
    report = run(folder, tmp_path / "rows", *options, model="checkpoint", samples=2)
    weights = load_file(tmp_path / "rows/model.safetensors")
    assert weights["model.layers.0.attn.q_proj.weight_scale"].shape == (32, 1)
    assert weights["model.embeddings.weight"].dtype == torch.float32
    asked = json.loads((tmp_path / "rows/config.json").read_text())["quantization_config"]
    assert asked["group_size"] is None and not asked["keys_and_values"]
    assert set(asked["linears"].values()) == {"int8", "float"}
    assert report["measured"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["rows"], "the export in between is gone"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--group-size", "10"),
            "--group-size 10 does not divide the 32 inputs of q_proj; .* or take --group-size row",
        ),
        (("--group-size", "x"), "--group-size is x; give a number of weights, 128 as published, or row"),
        (("--samples", "100000", "--group-size", "16"), "samples of 32 tokens, not 100000; lower --samples"),
        (("--samples", "0"), "--samples is 0; give at least 1"),
        (("--k", "-1"), "--k is -1.0; give a number above 0"),
        (("--projections", "qkv,qkv"), "--projections qkv,qkv lists qkv twice; known are"),
        (("--spikes", "all"), "--spikes all lists all too; known are"),
        (("--data", "nowhere"), "there is no nowhere.bin"),
        (("--data", "CUT", "--group-size", "16"), "cut.idx is 20 bytes long instead of .*: it is truncated"),
        (
            ("--output", "FULL", "--group-size", "16"),
            "full is not empty; choose another folder or add --over",
        ),
        (("--output", "FULL", "--overwrite", "--group-size", "16"), "has no config.json, so it was not made"),
        (("--output", "EXPORT", "--overwrite", "--group-size", "16"), "and the source .* overlap; choose"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_input_is_one_sentence_and_writes_nothing(
    words: tuple[str, ...],
    sentence: str,
    dry_run: bool,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dry run refuses the same."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("")
    (tmp_path / "cut.idx").write_bytes((folder / "with.idx").read_bytes()[:20])
    (tmp_path / "cut.bin").write_bytes((folder / "with.bin").read_bytes())
    places = {"FULL": tmp_path / "full", "CUT": tmp_path / "cut", "EXPORT": folder / "export"}
    before = {path.name for path in (*tmp_path.rglob("*"), *folder.rglob("*"))}
    given = [str(places.get(word, word)) for word in words]
    with pytest.raises(SystemExit) as end:
        run(folder, tmp_path / "out", *given, *(["--dry-run"] if dry_run else []))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(sentence, error), error
    after = {path.name for path in (*tmp_path.rglob("*"), *folder.rglob("*"))}
    assert {name for name in after - before if not name.endswith(".checked")} == set()


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = ("--group-size", GROUP, "--float-embeddings")
    for module, name in ((SafetensorsWriter, "write"), (quantization_report, "draw_layer_errors")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(module, name, full)
            run(folder, tmp_path / "out", *options, model="checkpoint", samples=2)
        assert end.value.code == 2
        assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["out.export.tmp-*/export/config.json", "out.tmp-*/new/config.json"])
def test_a_killed_call_leaves_nothing_that_the_next_one_does_not_remove(
    moment: str, folder: Path, tmp_path: Path
) -> None:
    """Killed with the export in between there, and while the output is written."""
    words = ("--group-size", GROUP, "--float-embeddings")
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out"), *words]
    killed = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(moment)):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())
    run(folder, tmp_path / "out", *words, model="checkpoint", samples=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights["model.layers.0.attn.q_proj.weight"].dtype == torch.int8


KILLED = """
import sys, time
from pathlib import Path
from spikingbrain_train.conversion.safetensors_io import SafetensorsWriter
from tests.quantization.test_command import run
write = SafetensorsWriter.write
def slowly(*arguments):
    time.sleep(0.2)
    write(*arguments)
SafetensorsWriter.write = slowly
run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:], model="checkpoint", samples=2)
"""


def test_queries_that_were_trained_with_spikes_keep_them(folder: Path, tmp_path: Path) -> None:
    """In what is measured as in what is written."""
    from omegaconf import OmegaConf

    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    path = next((tmp_path / "checkpoint").rglob(MODEL_CONFIG_FILE))
    model = OmegaConf.load(path)
    model.spiking = {"projections": ["mlp_fc1"], "k": 3.0, "queries": True}
    OmegaConf.save(model, path)
    held_out = ("--data", str(folder / "assignment"), "--max-windows", "4")
    report = run(
        folder, tmp_path / "out", "--group-size", GROUP, *held_out, model=str(tmp_path / "checkpoint")
    )
    last = report["measured"][-1]["cross_entropy"]
    assert cross_entropy(tmp_path / "out", tmp_path / "a.json", *held_out) == pytest.approx(last, abs=1e-4)


def test_what_is_quantised_is_not_quantised_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "export/config.json").read_text())
    again = tmp_path / "again"
    again.mkdir()
    (again / "model.safetensors").write_bytes(b"")
    (again / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", model="again")
    assert "is quantised already" in capsys.readouterr().err
    (again / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", model="again")
    assert "has no modelling code for INT8 weights" in capsys.readouterr().err


def test_experts_of_the_own_format_become_int8(folder: Path, tmp_path: Path) -> None:
    """By calibration, and as they were trained: the same codes, and both load."""
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM

    recipe = ConversionConfig(mixers=["gla", "swa"], feed_forwards=["moe", "dense"], sliding_window=7)
    recipe.moe.num_experts = 4
    import_checkpoint(folder / "source", tmp_path / "checkpoint", recipe)
    options = ("--group-size", GROUP, "--scales", "largest", "--spikes", "none")
    run(folder, tmp_path / "calibrated", *options, "--float-embeddings", model=tmp_path / "checkpoint")
    path = next((tmp_path / "checkpoint").rglob(MODEL_CONFIG_FILE))
    model = OmegaConf.load(path)
    names = ["qkv", "gate", "attention_output", "mlp_fc1", "mlp_fc2"]
    model.quantization = {"projections": names, "group_size": int(GROUP), "keys_and_values": True}
    OmegaConf.save(model, path)
    report = export_checkpoint(tmp_path / "checkpoint", tmp_path / "trained")
    assert report.architecture == "SpikingBrainForCausalLM" and not any("INT8" in n for n in report.notes)
    calibrated, trained = (load_file(tmp_path / n / "model.safetensors") for n in ("calibrated", "trained"))
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert trained[name].dtype == torch.int8
    for each in (name, f"{name}_scale", "model.layers.1.self_attn.o_proj.weight"):
        assert torch.equal(calibrated[each], trained[each]), each
    ids = torch.arange(30).view(2, 15)
    found = []
    for each in ("calibrated", "trained"):
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            tmp_path / each, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        with torch.no_grad():
            found.append(loaded(ids).logits)
    # One reads INT8 numbers, the other floats.
    assert 0 < (found[0] - found[1]).norm() < 0.1 * found[1].norm()
