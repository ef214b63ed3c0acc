"""Exports under vLLM itself, on the CPU: its greedy tokens are those of generate().

`make vllm` makes the environment; without it these tests skip. .ci/run does not make it: it has a torch of
its own and takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
FORMS = {
    "as SpikingBrain-7B, and a full layer": {"full_attention_layers": [3]},
    "norms, output gates, no biases, tied": {
        "qk_norm": True,
        "linear_output_gate": True,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "linear_num_key_value_heads": 4,
    },
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no environment with vLLM; `make vllm` makes it"),
]


@pytest.mark.parametrize(("form", "ranks"), zip(FORMS, (1, 2), strict=True))
def test_greedy_tokens_are_those_of_generate(form: str, ranks: int, tmp_path: Path) -> None:
    """On one rank, and on two that share the heads."""
    torch.manual_seed(0)
    config = GLAswaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention on CPUs has none that is smaller
        sliding_window=20,
        max_position_embeddings=512,
        rope_theta=10000.0,
        initializer_range=0.2,  # so that tokens differ
        **FORMS[form],
    )
    model = GLAswaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "export")
    random = torch.Generator().manual_seed(1)
    # More than are answered at a time, longer than the window, longer than a step takes, and one token.
    prompts = [torch.randint(1, 384, (n,), generator=random).tolist() for n in (5, 1, 70, 33, 100, 2)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    answers = tmp_path / "answers.json"
    program = ROOT / "tests/vllm_plugin/tokens.py"
    done = subprocess.run(
        [PYTHON, program, tmp_path / "export", tmp_path / "prompts.json", answers, str(ranks)],
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks may share cores
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(answers.read_text())
    assert said["registered"] and said["is_hybrid"] and said["has_inner_state"]
    for prompt, answer in zip(prompts, said["answers"], strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert answer == wanted[0, len(prompt) :].tolist(), f"of {len(prompt)} tokens"
        assert len(set(answer)) > 4, "a test that repeats one token tells little"
