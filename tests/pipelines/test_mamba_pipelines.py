"""Mamba as pipelines: from a dense model by alignment and distillation, and a Falcon-Mamba folder trained on.

Cross entropies of a checkpoint and of its export are within 1e-4: logits are within 2e-4 (tests/conversion).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, FalconMambaConfig, FalconMambaForCausalLM

from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.evaluation.text_windows import windows_of_data
from spikingbrain_train.reporting.metrics import read_metrics
from tests.pipelines.planned import steps_of
from tests.pipelines.tiny_runs import read, run_to_its_end
from tests.programs import Programs
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source, save_small_tokenizer

GIVEN = ("model=source", "text=[text.jsonl]", "output=out")
LENGTH, WINDOWS, STEPS, LR, MIN_LR = 32, 8, 6, 5e-3, 5e-4
MEASURED = (
    *(f"seq_length={LENGTH}", f"windows={WINDOWS}", "valid_tokens=1024", "steps.text.workers=1"),
    "steps.evaluate_export.dtype=float32",
)
SHORT = f"stage.train_iters={STEPS}, stage.global_batch_size=2, precision=fp32, logging.log_interval=1"
TRAINED = (f"lr={LR}", f"min_lr={MIN_LR}", f"train=[{SHORT}]")
TINY = {
    "mamba": (
        *(*MEASURED, *TRAINED, f"align=[stage.train_iters={STEPS}, precision=fp32]", "align_lr=1e-2"),
        *("recipe=[sliding_window=16, mamba.state_size=8]", "steps.evaluate_distilled.dtype=float32"),
    ),
    "falcon_mamba": (
        *(*MEASURED, *TRAINED, "steps.evaluate_trained.dtype=float32"),
        *("warmup_iters=2", "decay_iters=2"),
    ),
}


def test_both_are_planned(workplace: Path) -> None:
    from_attention, goes_on = (steps_of(name, *GIVEN) for name in TINY)
    assert from_attention["align"].train_iters == 80
    assert from_attention["distill"].train_iters == goes_on["cpt"].train_iters == 1000
    recipe = steps_of("mamba", *GIVEN, 'recipe=["mixers=[mamba]"]')["hybrid"].recipe
    assert recipe is not None and recipe.mixers == ["mamba"] and recipe.mamba.use_bias


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("mamba", ["recipe=[mamba.state_size=0]"], "step hybrid: mamba.state_size=0"),
        ("mamba", ["align=[stage.teacher=null]"], "step align: "),
        ("mamba", ["windows=0"], "step evaluate_dense: --max-windows is 0; give at least 1"),
        ("falcon_mamba", ["decay_iters=2000"], "step cpt: optimizer.lr_wsd_decay_iters=2000"),
    ],
)
def test_what_would_be_refused_later_is_refused_before(
    workplace: Path, name: str, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SpikingBrainError) as refusal:
        steps_of(name, *GIVEN, *arguments)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def entropy(folder: Path, step: str) -> float:
    return float(read(folder / f"out/{step}.json")["cross_entropy"])


@torch.no_grad()
def entropy_by_transformers(folder: Path, **how: Any) -> float:
    """Of the export, on the windows that its pipeline measures."""
    model = AutoModelForCausalLM.from_pretrained(folder / "out/export", dtype=torch.float32, **how)
    prefix = str(folder / "out/text/text_valid")
    windows = torch.tensor(windows_of_data([prefix], folder / "source", MODEL_VOCAB_SIZE, WINDOWS, LENGTH))
    logits = model.eval()(windows[:, :-1]).logits
    return float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dense_model_becomes_a_hybrid_that_transformers_reads(programs: Programs, tmp_path: Path) -> None:
    save_small_source(tmp_path / "source")
    run_to_its_end(programs, "mamba", (*GIVEN, *TINY["mamba"]), tmp_path, steps=10)
    config = read(tmp_path / "out/export/config.json")
    assert config["model_type"] == "spikingbrain"
    assert any("A_log" in name for name in tensors(tmp_path))
    found = entropy_by_transformers(tmp_path, trust_remote_code=True)
    assert entropy(tmp_path, "evaluate_export") == pytest.approx(found, abs=1e-4)
    assert entropy(tmp_path, "evaluate_distilled") == pytest.approx(found, abs=1e-4)
    losses = [line for line in read_metrics(tmp_path / "out/distill") if "train/kl_divergence" in line]
    assert len(losses) == STEPS
    # Alignment alone is evaluated in the number format of this machine: 6.67, where distillation is at 6.46.
    assert entropy(tmp_path, "evaluate_aligned") > found + 0.05


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out/export/model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_falcon_mamba_goes_on_and_stays_one(programs: Programs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_small_tokenizer(source)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "state_size": 8, "num_hidden_layers": 2}
    config = FalconMambaConfig(vocab_size=MODEL_VOCAB_SIZE, bos_token_id=0, eos_token_id=0, **sizes)
    FalconMambaForCausalLM(config).save_pretrained(source)
    run_to_its_end(programs, "falcon_mamba", (*GIVEN, *TINY["falcon_mamba"]), tmp_path, steps=7)

    was, now = (read(each / "config.json") for each in (source, tmp_path / "out/export"))
    assert now["architectures"] == was["architectures"] == ["FalconMambaForCausalLM"]
    assert "auto_map" not in now
    assert tensors(tmp_path).keys() == load_file(source / "model.safetensors").keys()
    found = entropy_by_transformers(tmp_path)
    assert entropy(tmp_path, "evaluate_export") == pytest.approx(found, abs=1e-4)
    assert entropy(tmp_path, "evaluate_trained") == pytest.approx(found, abs=1e-4)
    assert entropy(tmp_path, "evaluate_source") > found + 0.01
    rates = [
        line["train/learning_rate"] for line in read_metrics(tmp_path / "out/cpt") if "train/loss" in line
    ]
    # Warm-up over two steps, constant, an exponential decay over the last two.
    assert rates[1:4] == pytest.approx([LR] * 3) and rates[0] < LR > rates[4] > rates[5]
    assert rates[5] == pytest.approx(MIN_LR)
