"""spikingbrain-quantize --format w8aspike: the same codes and scales, in the published layout.

Held against a plain twin of the published class and against the folder of INT8 tensors.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.data.preprocess import PreprocessOptions, preprocess
from spikingbrain_train.quantization.command_line import quantize
from tests.conversion.hf_models import all_tensors
from tests.conversion.published_w8aspike import CONFIG, PublishedW8ASpikeModel, write_published_folder
from tests.small_source import save_small_source

ROUNDED = ("q_proj", "k_proj", "v_proj", "o_proj", "gk_proj", "gate_proj", "up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model in floats with a full-rank gate, and text for its vocabulary."""
    folder = tmp_path_factory.mktemp("floats")
    tensors = write_published_folder(folder / "published")
    (folder / "floats").mkdir()
    floats = {name: x for name, x in tensors.items() if "weight_quantizer" not in name}
    save_file(floats, folder / "floats/model.safetensors")
    import_checkpoint(folder / "published", folder / "megatron")
    export_checkpoint(folder / "megatron", folder / "export")
    config = json.loads((folder / "export/config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("w8aspike", "spiking")}
    (folder / "floats/config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(CONFIG["vocab_size"])}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(folder / "floats")
    import_checkpoint(folder / "floats", folder / "checkpoint")
    chosen = random.Random(0).choices(range(2, CONFIG["vocab_size"]), k=400)
    (folder / "text.txt").write_text(" ".join(f"t{i}" for i in chosen))
    preprocess(PreprocessOptions([str(folder / "text.txt")], str(folder / "text"), str(folder / "floats")))
    return folder


def run(folder: Path, output: Path, *words: str, model: str = "checkpoint") -> None:
    text = str(folder / "text")
    quantize(
        [
            *("--model", str(folder / model), "--output", str(output), "--calibration-data", text),
            *("--samples", "4", "--seq-length", "32", "--device", "cpu", "--dtype", "float32", *words),
        ]
    )


@pytest.mark.parametrize("method", ["plain", "gptq"])
def test_the_published_class_finds_the_codes_and_scales(folder: Path, tmp_path: Path, method: str) -> None:
    held_out = ("--data", str(folder / "text"), "--max-windows", "2")
    run(folder, tmp_path / "out", "--format", "w8aspike", "--method", method, *held_out)
    model = PublishedW8ASpikeModel(tmp_path / "out")  # which checks names and shapes
    for name, weight in model.tensors.items():
        if name.split(".")[-2] in ROUNDED and name.endswith(".weight"):
            scales = model.tensors[f"{name}_quantizer.scales"]
            codes = (weight.unflatten(1, (-1, 128)) / scales).round()
            assert codes.abs().max() <= 127 and torch.equal((codes * scales).flatten(1), weight), name
    loaded, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    ids = torch.randint(CONFIG["vocab_size"], (32, 16), generator=torch.Generator().manual_seed(1))
    expected = model.logits(ids)
    with torch.no_grad():
        found = loaded.eval()(ids).logits
    assert model.doubtful is not None
    sure = model.doubtful.int().cumsum(1) == 0  # up to the first count that rounding alone decides
    assert sure[:, 8:].sum() >= 10, "windows of 7 are left behind"
    assert (found - expected)[sure].abs().max() <= 2e-4
    report = json.loads((tmp_path / "out/quantization.json").read_text())
    assert [each["what"] for each in report["measured"]][-2:] == [
        "+ spikes with k 3",
        "+ INT8 keys and values",
    ]

    import_checkpoint(tmp_path / "out", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "again")
    again = all_tensors(tmp_path / "again")
    assert again.keys() == model.tensors.keys()
    assert all(torch.equal(again[name], x) for name, x in model.tensors.items())


def test_it_holds_the_numbers_of_the_folder_of_int8_tensors(folder: Path, tmp_path: Path) -> None:
    """With scales of the largest weights, which depend on nothing else."""
    projections = "qkv,gate,attention_output,mlp_fc1"
    run(folder, tmp_path / "published", "--format", "w8aspike", "--scales", "largest")
    run(folder, tmp_path / "int8", "--projections", projections, "--scales", "largest", "--float-embeddings")
    published, int8 = all_tensors(tmp_path / "published"), all_tensors(tmp_path / "int8")
    compared = 0
    for name, codes in int8.items():
        if codes.dtype != torch.int8:
            continue
        scales = int8[f"{name}_scale"].float()
        assert torch.equal(published[f"{name}_quantizer.scales"].squeeze(-1), scales)
        found = (published[name].unflatten(1, (-1, 128)) / scales.unsqueeze(-1)).round().flatten(1)
        assert torch.equal(found, codes.float()), name
        compared += 1
    assert compared == 2 * 7 + 2 * 6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--group-size", "row"), "has groups of 128 weights, not --group-size row; leave"),
        (("--k", "4"), "cannot hold spikes with k 4; leave --format out"),
        (("--projections", "qkv,mlp_fc2"), "cannot hold INT8 weights elsewhere than in qkv, gate"),
        (("--float-keys-and-values",), "cannot hold float keys and values"),
    ],
)
def test_what_the_layout_cannot_hold_is_one_sentence(
    words: tuple[str, ...], sentence: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(folder, tmp_path / "out", "--format", "w8aspike", *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and re.search(sentence, error), error
    assert not list(tmp_path.iterdir())


def test_a_low_rank_gate_has_no_place_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spikingbrain_train.config.conversion import ConversionConfig

    source = save_small_source(tmp_path / "source")
    import_checkpoint(source, tmp_path / "model", ConversionConfig(mixers=["gla", "swa"], sliding_window=7))
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", "--format", "w8aspike", model=str(tmp_path / "model"))
    assert "cannot hold a low_rank gate and inputs that 128 does not divide" in capsys.readouterr().err
