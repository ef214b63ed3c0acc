"""A training step of every model and topology of conf/ on a GPU that computes nothing: see fake_cuda.py.

Real widths and lengths, a few layers; the trainer's step with all callbacks of a run, over two micro-batches,
and what a checkpoint would hold. What costs a GPU time is in the tables here, each with its reason; all else
fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.yaml_files import conf_folder
from tests.fake_gpu.fake_cuda import GPU, fake_cuda

ROOT = Path(__file__).parents[2]

MODELS = [
    *("model=tiny_hybrid", "model=tiny_76b", "model=hybrid_1b", "model=qwen2_5_7b", "model=smollm2_135m"),
    *("experiment=smollm2_align", "experiment=smollm2_cpt", "experiment=spikingbrain_7b_sft1"),
    *("experiment=mamba_130m", "experiment=falcon_mamba_7b", "experiment=bitnet_2b4t"),
    "model=smollm2_135m_hybrid model.mixers=[gdn,swa]",
    *(f"experiment=spikingbrain_7b_{name}" for name in ("8k", "32k", "128k", "align", "distill")),
    *(f"experiment=spikingbrain_76b_{name}" for name in ("8k", "32k", "128k", "align", "distill")),
]


def layouts() -> Iterator[str]:
    """Files of conf/parallel that no experiment above takes, with the SpikingBrain that they are for."""
    taken = "".join(
        (conf_folder() / "experiment" / f"{name.removeprefix('experiment=')}.yaml").read_text()
        for name in MODELS
        if name.startswith("experiment=")
    )
    for path in sorted((conf_folder() / "parallel").glob("*.yaml")):
        text = path.read_text()
        # DeepSpeed's engine asks CUDA for more than is played here.
        if f"override /parallel: {path.stem}\n" not in taken and "engine: deepspeed" not in text:
            model = "76b" if "expert_model_parallel_size" in text else "7b"
            yield f"model=spikingbrain_{model} parallel={path.stem}"


RUNS = [
    *MODELS,
    *layouts(),
    "model=spikingbrain_76b parallel=pp2 parallel.virtual_pipeline_model_parallel_size=2",
    "model=spikingbrain_7b parallel=dp_zero1 optimizer=muon_cosine",
    "model=tiny_76b parallel.recompute_expert_tokens=1000",
    "model=spikingbrain_76b parallel=dp32_ep8_pp4 parallel.recompute_expert_tokens=1000",
    "model=tiny_76b cluster=metax",
    "model=spikingbrain_7b parallel=dp_zero1 cluster=c550",
]

WAITS = {
    "_local_scalar_dense megatron/distributed/finalize_model_grads.py:finalize_model_grads": (
        "the number of tokens, once a step (and virtual stage), behind the last backward pass"
    ),
    "_local_scalar_dense megatron/optimizer/clip_grads.py:get_grad_norm_fp32": (
        "the gradient norm, which decides whether there is an update"
    ),
    "_local_scalar_dense megatron/utils.py:local_multi_tensor_l2_norm": (
        "the norm of each gradient, where neither Transformer Engine nor Apex is installed"
    ),
    "to the CPU megatron/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu": (
        "how many tokens each expert gets: the sizes of all-to-all and of the experts' products"
    ),
    "masked_select megatron/transformer/moe/moe_utils.py:permute": (
        "which tokens an expert gets, with megatron-core's unfused permutation"
    ),
    "to the CPU spikingbrain_train/training/callbacks/callbacks.py:agree": (
        "what ranks have voted, once a step: whether the weights change, and whether the run goes on"
    ),
}
"""Where the CPU waits for the GPU within a step, and why. The last one is ours."""

ON_CPU = {
    "spikingbrain_train/data/loader.py:<genexpr>": "batches are cut on the CPU and copied from pinned memory",
    "spikingbrain_train/ops/softmax_attention/flex.py:_seen_text": "what queries see, once for each layout",
    "spikingbrain_train/ops/softmax_attention/flex.py:<genexpr>": "the same, on their way to the GPU",
    "megatron/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu": "numbers of tokens",
    "megatron/transformer/moe/token_dispatcher.py:dispatch_postprocess": "numbers of tokens",
    "megatron/transformer/moe/token_dispatcher.py:combine_preprocess": "numbers of tokens",
    "megatron/tensor_parallel/random.py:backward": "numbers of tokens, of layers that are computed again",
    "megatron/tensor_parallel/random.py:fork": "states of random generators",
    "megatron/utils.py:local_multi_tensor_l2_norm": "norms of gradients, see above",
}
"""Where the CPU computes within a step, and on what."""

WIDE = {
    "spikingbrain_train/models/feed_forwards/moe/router.py:forward": "routers compute in float32",
    "spikingbrain_train/models/feed_forwards/moe/router.py:backward": "the same",
    "spikingbrain_train/ops/gated_linear_attention/end_state.py:gated_linear_attention_end_state": (
        "states that travel between context-parallel ranks"
    ),
    "spikingbrain_train/ops/softmax_attention/torch_sdpa.py:bidirectional_attention": (
        "queries of sinks; torch's SDPA has no fused form on the meta device"
    ),
    "megatron/pipeline_parallel/schedules.py:backward_step": "gradients of these",
    "megatron/tensor_parallel/random.py:backward": "gradients of these in layers that are computed again",
}
"""Where matrices of float32 are multiplied, and why."""


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """What the steps of all runs did, by run and rank, from one process without patches for CPUs."""
    if version("megatron-core") != "0.16.1" or torch.__version__ < "2.13":
        pytest.skip("the tables here are of megatron-core 0.16.1 and torch 2.13")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu.steps", *RUNS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=340)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def places(found: Iterable[str]) -> set[str]:
    return {each.split(" ")[-1] for each in found}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_step_stays_on_the_gpu_and_waits_only_where_it_has_to(run: str, steps: dict[str, Any]) -> None:
    of_run = {name: found for name, found in steps.items() if name.startswith(f"{run}, ")}
    assert of_run
    for name, found in of_run.items():
        assert not found["off the GPU"], name
        assert not found["patches for CPUs"], name
        assert not found["mixed"], name
        assert set(found["waits"]) <= set(WAITS), name
        assert places(found["on_cpu"]) <= set(ON_CPU), name
        assert found["saved"] > 0
        # What is multiplied in float32 in a bf16 run takes many times as long.
        wide = {place for place in found["products"] if not place.startswith("bfloat16 ")}
        assert places(wide) <= set(WIDE), name


@pytest.mark.slow
def test_every_reason_is_of_a_wait_that_there_is(steps: dict[str, Any]) -> None:
    assert set(WAITS) == {each for found in steps.values() for each in found["waits"]}
    assert set(ON_CPU) == {each for found in steps.values() for each in places(found["on_cpu"])}
    assert set(WIDE) == {
        place
        for found in steps.values()
        for place in places(each for each in found["products"] if not each.startswith("bfloat16 "))
    }
    (tokens, _), (votes, _) = ((name, why) for name, why in WAITS.items() if "once a step" in why)
    for name, found in steps.items():
        assert found["waits"][votes] == 1
        assert found["waits"][tokens] == (2 if "virtual" in name else 1)


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=x.dtype, device="cpu")


def test_what_a_gpu_would_not_like_is_found() -> None:
    with fake_cuda(ones, torch.numel) as findings:
        x = torch.ones(3, 3, device="cuda", requires_grad=True)
        assert x.device == GPU and x.is_cuda and torch.zeros_like(x).is_cuda
        (x @ x).sum().backward()
        assert x.grad is not None and x.grad.is_cuda
        assert not findings.mixed and not findings.waits and not findings.on_cpu
        assert list(findings.products) == ["float32 elsewhere"]
        x[torch.zeros(1, dtype=torch.int64)]
        assert list(findings.mixed) == ["index elsewhere"]
        x.sum().item()
        bool(x.sum() > 0)
        x.detach().cpu()
        torch.nonzero(x)
        with pytest.raises(NotImplementedError):
            x[x > 0]
        waits = {"_local_scalar_dense", "to the CPU", "nonzero", "mask"}
        assert findings.waits.keys() == {f"{wait} elsewhere" for wait in waits}
        assert findings.waits["_local_scalar_dense elsewhere"] == 2
        findings.clear()
        torch.ones(3) + torch.ones(3)
        assert "add elsewhere" in findings.on_cpu
    assert not torch.cuda.is_available()
