"""Cross entropy of Hugging Face models over training's held-out windows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)

from spikingbrain_train.data.gpt_dataset import ValidDataset, open_valid_dataset
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.evaluation import position_logits
from spikingbrain_train.evaluation.command_line import evaluate
from spikingbrain_train.evaluation.perplexity import measure_perplexity
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from spikingbrain_train.reporting import activity
from spikingbrain_train.runtime import bf16
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

SEQ_LENGTH = 48


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prefix(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "held_out.txt").write_text("The for statement is used to iterate over the elements. " * 9)
    preprocess(PreprocessOptions([str(folder / "held_out.txt")], str(folder / "text"), str(source)))
    return str(folder / "text")


@pytest.fixture(scope="module")
def dataset(prefix: str) -> ValidDataset:
    return open_valid_dataset([prefix], SEQ_LENGTH)


def loss_by_transformers(model: PreTrainedModel, dataset: ValidDataset) -> tuple[float, int]:
    """transformers' own mean loss of each window, weighted by its labels; padding is cut off, not masked."""
    total, tokens = 0.0, 0
    for index in range(len(dataset)):
        sample = dataset[index]
        count = int(sample["loss_mask"].sum())
        text = torch.cat([sample["tokens"][:count], sample["labels"][count - 1 : count]])
        with torch.no_grad():
            total += float(model(input_ids=text[None], labels=text[None]).loss) * count
        tokens += count
    return total / tokens, tokens


@pytest.fixture(params=["one chunk", "chunks of 5 positions"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param != "one chunk":
        monkeypatch.setattr(position_logits, "LOGIT_BYTES", 5 * 4 * MODEL_VOCAB_SIZE)
    yield


def test_equals_the_loss_that_transformers_computes(source: Path, dataset: ValidDataset, chunk: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    expected, tokens = loss_by_transformers(model, dataset)
    measured = measure_perplexity(model, dataset)
    # Both are fp32 means over some 300 tokens, summed in another order.
    assert measured.cross_entropy == pytest.approx(expected, rel=1e-6)
    assert (measured.tokens, measured.windows) == (tokens, len(dataset))
    assert tokens % SEQ_LENGTH, "the last window should be padded, or the mask goes untested"
    assert measured.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_model_that_changes_its_logits_is_measured_with_them(dataset: ValidDataset, chunk: None) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=MODEL_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    expected, _ = loss_by_transformers(model, dataset)
    assert measure_perplexity(model, dataset).cross_entropy == pytest.approx(expected, rel=1e-6)


def test_a_decoder_in_float32_before_weights_in_bfloat16_is_measured(dataset: ValidDataset) -> None:
    """Falcon-Mamba's: its residuals stay in float32. Sums of the same bfloat16 logits in another order."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "state_size": 8, "num_hidden_layers": 2}
    config = FalconMambaConfig(vocab_size=MODEL_VOCAB_SIZE, **sizes)
    model = FalconMambaForCausalLM(config).to(torch.bfloat16).eval()
    expected, _ = loss_by_transformers(model, dataset)
    assert measure_perplexity(model, dataset).cross_entropy == pytest.approx(expected, rel=1e-4)


def test_command_line_prints_and_writes_the_numbers(
    source: Path, prefix: str, dataset: ValidDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "deep" / "result.json"
    evaluate(
        ["--model", str(source), "--data", prefix, "--seq-length", str(SEQ_LENGTH), "--max-windows", "2"]
        + ["--device", "cpu", "--dtype", "float32", "--output", str(result)]
    )
    numbers = json.loads(result.read_text())
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    expected, tokens = loss_by_transformers(model, open_valid_dataset([prefix], SEQ_LENGTH, 2))
    assert numbers["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    assert (numbers["tokens"], numbers["windows"]) == (tokens, 2) and tokens == 2 * SEQ_LENGTH
    assert f"cross entropy  {expected:.4f} nats per token" in capsys.readouterr().out


def test_the_command_is_silent_about_what_megatron_core_lacks(source: Path, prefix: str) -> None:
    options = ["--data", prefix, "--seq-length", str(SEQ_LENGTH), "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, "-m", "spikingbrain_train", "evaluate", "--model", str(source), *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ended.returncode == 0 and "cross entropy" in ended.stdout
    assert "Apex" not in ended.stderr and "megatron" not in ended.stderr


def load(folder: Path) -> PreTrainedModel:
    return load_causal_lm(folder, trust_remote_code=False, dtype=torch.float32, device=torch.device("cpu"))


def test_code_in_a_folder_is_not_run_without_leave(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Mine"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ConfigurationError, match=r"its own modelling code \(code.py\).*--trust-remote-code"):
        load(tmp_path)


def test_missing_tensors_are_refused_instead_of_drawn_at_random(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match="lacks 1 tensors .*layers.1.mlp.up_proj"):
        load(tmp_path)


def test_weights_in_a_pickle_are_not_opened(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seq-length", "0"], "--seq-length is 0"),
        (["--max-windows", "0"], "--max-windows is 0"),
        (["--data", "nowhere"], "there is no nowhere.bin"),
        (["--model", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    source: Path, prefix: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        evaluate(["--model", str(source), "--data", prefix, "--device", "cpu", *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


@pytest.mark.parametrize(("able", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_the_format_that_the_hardware_multiplies(
    source: Path,
    prefix: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    able: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(bf16, "bf16_instructions", lambda: able)
    monkeypatch.setattr(bf16, "_onednn_takes_bf16", lambda: able)
    monkeypatch.setattr(bf16, "product_slowdown", lambda dtype: 29.0)
    command = ["--model", str(source), "--data", prefix, "--seq-length", str(SEQ_LENGTH)]
    evaluate([*command, "--max-windows", "1", "--device", "cpu"])
    assert f"({type(load(source)).__name__}, {expected})" in capsys.readouterr().out
    evaluate([*command, "--max-windows", "1", "--device", "cpu", "--dtype", "bfloat16"])
    said = capsys.readouterr()
    assert ("29 times slower than fp32" in said.err) is not able and "bfloat16)" in said.out


def test_evaluation_says_how_far_it_is_in_a_log(
    source: Path, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(activity, "_TICK_SECONDS", 0.001)
    evaluate(["--model", str(source), "--data", prefix, "--seq-length", str(SEQ_LENGTH), "--device", "cpu"])
    said = capsys.readouterr().err
    assert f"loading {source} ..." in said and "windows ..." in said
