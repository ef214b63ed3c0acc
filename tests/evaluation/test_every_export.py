"""spikingbrain-evaluate and spikingbrain-generate take every export, and give what the Megatron model gives.

The mean loss within 1e-4, the greedy text in full. What a plugin brings is in tests/plugins/test_exports.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.model import GateKind, ModelConfig
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool
from tests.evaluation.exported_folders import Text, check_both_commands, save_text

ORIGINAL = 24
ROPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"beta_fast": 4.0},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
_7B = replace(CASES["GLA, low-rank gate"].model, mixers=["gla", "swa"])
_MAMBA = CASES["Mamba, one layer without a feed-forward"].model
_INT8 = [Projection.qkv, Projection.gate, Projection.attention_output, Projection.mlp_fc1]


def scaled(kind: str) -> ModelConfig:
    original = {} if kind == "linear" else {"original_max_position_embeddings": ORIGINAL}
    rope = RopeScalingConfig(rope_type=RopeType(kind), factor=4.0, **original, **ROPES[kind])
    return replace(_7B, rope_scaling=rope)


def w8aspike(model: ModelConfig, group_size: int = 8, **more: Any) -> ModelConfig:
    return replace(
        model,
        spiking=SpikingConfig(_INT8, k=3.0, **more),
        quantization=QuantizationConfig(_INT8, group_size, keys_and_values=True),
    )


MODELS: dict[str, tuple[ModelConfig, str | None]] = {
    **{
        name: (case.model, None)
        for name, case in CASES.items()
        # Packed and with drop-out they are the same models in evaluation; adapters are no part of an export.
        if not case.packed and "drop-out" not in name and not case.model.lora.names
    },
    "Mamba of transformers": (replace(_MAMBA, feed_forwards=["no_mlp"]), "mamba"),
    "7B in the own format": (_7B, "spikingbrain"),
    **{f"rotary positions: {kind}": (scaled(kind), None) for kind in ROPES},
    "rotary positions of branches": (
        replace(CASES["76B-like"].model, rope_scaling=scaled("dynamic").rope_scaling),
        None,
    ),
    "W8ASpike": (w8aspike(_7B), None),
    "W8ASpike of branches and experts": (w8aspike(replace(CASES["76B-like"].model, num_layers=2)), None),
    "W8ASpike as published": (
        w8aspike(
            replace(
                _7B,
                hidden_size=128,
                ffn_hidden_size=128,
                kv_channels=32,
                gla=replace(_7B.gla, gate=GateKind.full_rank),
            ),
            128,
            queries=True,
        ),
        "w8aspike",
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return save_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("name", MODELS)
def test_both_commands_give_what_the_megatron_model_gives(
    ranks: RankPool, tmp_path: Path, text: Text, name: str
) -> None:
    network, format_name = MODELS[name]
    check_both_commands(ranks, tmp_path, network, text, format_name=format_name)


TASK = """\
task: continuations
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""


@pytest.mark.slow
def test_lm_evals_own_command_takes_an_export(ranks: RankPool, tmp_path: Path, text: Text) -> None:
    pytest.importorskip("lm_eval")
    export = check_both_commands(ranks, tmp_path, CASES["76B-like"].model, text)
    questions = [
        {"text": "The for statement is used to", "choices": [" iterate", " stop"], "answer": n % 2}
        for n in range(4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "continuations.yaml").write_text(TASK % (tmp_path / "questions.jsonl"))
    command = ["--model", "hf", "--trust_remote_code", "--device", "cpu", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={export},dtype=float32", "--tasks", "continuations"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "results")]
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *command],
        cwd=tmp_path,
        env=os.environ
        | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        check=True,
        timeout=240,
    )
    (results,) = (tmp_path / "results").rglob("results_*.json")
    # The same question with either answer: half of them are right, whatever the model prefers.
    assert json.loads(results.read_text())["results"]["continuations"]["acc,none"] == 0.5
