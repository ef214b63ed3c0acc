"""A training step of every model and topology of conf/ on a GPU that computes nothing: see fake_cuda.py.

Real widths and lengths, a few layers; the trainer's step with all callbacks of a run, over two micro-batches,
and what a checkpoint would hold; of some runs a second step, which is reported, an evaluation, and the plan
of a save. What costs a GPU time is in the tables here, each with its reason; all else fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
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
        if f"override /parallel: {path.stem}\n" not in taken:
            model = "76b" if "expert_model_parallel_size" in text else "7b"
            yield f"model=spikingbrain_{model} parallel={path.stem}"


SPIKES = "[qkv,gate,attention_output,mlp_fc1,mlp_fc2]"
EVALUATORS = ",".join(
    (
        "{path:spikingbrain_train.evaluation.probes.evaluator.LongContextProbes,"
        "settings:{lengths:256,samples:1,depths:50}}",
        "{path:spikingbrain_train.evaluation.multiple_choice.evaluator.MultipleChoice,"
        "settings:{tasks:piqa,task_data:FOLDER}}",
        "{path:spikingbrain_train.evaluation.against_teacher.evaluator.AgainstTeacher,"
        "settings:{teacher:FOLDER,prompts:2,prompt_tokens:16,new_tokens:4}}",
    )
)
FSDP = "parallel.engine=fsdp parallel.overlap_param_gather=false"
ZERO = "model=spikingbrain_7b parallel=dp32_cp8_zero2 parallel.zero"

REPORTED = [
    *("model=tiny_76b", "experiment=spikingbrain_7b_align", "experiment=spikingbrain_7b_sft1"),
    "model=tiny_76b parallel=ep2 parallel.replicate_expert_load=2",
    f"model=tiny_hybrid parallel=tp2 model.spiking.projections={SPIKES} model.spiking.queries=true",
    f"model=tiny_hybrid model.quantization.projections={SPIKES} model.int8_inputs.projections=[qkv,mlp_fc1]",
    "model=tiny_hybrid model.activation_func=relu stage.sparsity.l1_factors=[0.001] "
    "stage.sparsity.l1_end_steps=[10]",
    f"model=tiny_hybrid data.tokenizer=FOLDER data.valid=[FOLDER/text] logging.evaluators=[{EVALUATORS}]",
    "model=spikingbrain_76b parallel=pp2 parallel.virtual_pipeline_model_parallel_size=2",
    "model=spikingbrain_7b parallel=dp32_cp8_zero2",
    f"model=spikingbrain_7b parallel=dp4_tp2 {FSDP}",
    f"experiment=spikingbrain_7b_align {FSDP}",
]
"""Runs of which a step is reported, too, and evaluated behind, and a save is planned."""

FP8 = {
    "model=tiny_76b parallel=ep2 model.num_sink_tokens=16 fp8.format=hybrid": "Float8CurrentScaling",
    "model=tiny_hybrid parallel=tp2_sp data.tokenizer=FOLDER data.valid=[FOLDER/text] fp8.format=e4m3 "
    "fp8.recipe=blockwise fp8.num_layers_at_start_in_bf16=1 reported": "Float8BlockScaling",
    "experiment=spikingbrain_7b_8k parallel.recompute=full fp8.format=hybrid": "Float8CurrentScaling",
    "model=spikingbrain_7b parallel=dp32_cp8_zero2 fp8.format=hybrid": "Float8CurrentScaling",
}
"""Runs whose linears are Transformer Engine's (engine.py), and the recipe that they are to multiply with."""

FUSED = (
    "cluster.kernels.parallel_linear=megatron cluster.kernels.weight_gradients=apex "
    "cluster.kernels.token_permutation=transformer_engine"
)
FUSED_RUNS = [
    "model=tiny_76b",
    "experiment=mamba_130m",
    "experiment=spikingbrain_7b_align",
    "model=spikingbrain_76b parallel=pp2 parallel.virtual_pipeline_model_parallel_size=2",
    "experiment=spikingbrain_76b_distill",
]
"""Runs that are stepped without and with what megatron-core takes of Apex and Transformer Engine."""

RUNS = [
    *(run for run in (*MODELS, *layouts()) if run not in REPORTED),
    *(f"{run} reported" for run in REPORTED),
    f"{ZERO}.stage=1 parallel.overlap_grad_reduce=false",
    "model=tiny_hybrid parallel.engine=deepspeed parallel.zero.offload_optimizer=true",
    f"model=tiny_76b {FSDP} parallel.fsdp.reshard_after_forward=false parallel.recompute_expert_tokens=1000",
    "model=spikingbrain_7b parallel=dp_zero1 optimizer=muon_cosine",
    "model=tiny_76b parallel.recompute_expert_tokens=1000",
    "model=spikingbrain_76b parallel=dp32_ep8_pp4 parallel.recompute_expert_tokens=1000",
    *(f"{run} {FUSED}" for run in FUSED_RUNS),
    "model=tiny_76b cluster=metax",
    "model=spikingbrain_7b parallel=dp_zero1 cluster=c550",
    *FP8,
    # The last ones: torch.nn.functional.linear is DeepSpeed's own behind the first of them.
    f"{ZERO}.stage=3 reported",
    "model=tiny_hybrid parallel.engine=deepspeed parallel.zero.offload_optimizer=true parallel.zero.stage=3",
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
    "to the GPU megatron/utils.py:local_multi_tensor_l2_norm": "the norm of those, made on the CPU",
    "to the GPU deepspeed/runtime/zero/stage3.py:get_grad_norm_direct": "ZeRO 3's norm, made on the CPU",
    "to the GPU deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": (
        "a number in its place: DeepSpeed's look at gradients"
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
    "_local_scalar_dense spikingbrain_train/training/engines/deepspeed.py:gradient_norm": (
        "the gradient norm under ZeRO 1 and 2, which callbacks see before anything is updated"
    ),
    "_local_scalar_dense spikingbrain_train/training/engines/fsdp.py:gradient_norm": (
        "the norm, once: the update clips by it without a look of its own"
    ),
    "_local_scalar_dense spikingbrain_train/training/engines/zero_three.py:gradient_norm": (
        "the same under ZeRO 3"
    ),
    "_local_scalar_dense deepspeed/runtime/zero/stage_1_and_2.py:has_overflow": (
        "DeepSpeed's own look at the gradients, in its update"
    ),
    "_local_scalar_dense deepspeed/runtime/utils.py:is_invalid_grad_norm": (
        "the norm again, in its update: by it DeepSpeed clips"
    ),
    "nonzero spikingbrain_train/models/feed_forwards/moe/replicated_experts.py:_chosen": (
        "which experts are replicated: of whom weights are sent"
    ),
    "to the CPU spikingbrain_train/models/feed_forwards/moe/replicated_experts.py:_chosen": "the same",
    "nonzero spikingbrain_train/models/feed_forwards/moe/replicated_experts.py:_computed_here": (
        "which tokens a replicated expert gets"
    ),
}
"""Where the CPU waits for the GPU within a step, and why."""

REPORT_WAITS = {
    "to the CPU spikingbrain_train/training/stages/losses.py:_reduced": "losses, once a report",
    "_local_scalar_dense spikingbrain_train/training/trainer.py:_report_step": "the norm of all weights",
    "_local_scalar_dense spikingbrain_train/training/callbacks/speed.py:_longest_data_wait": (
        "the longest wait of a rank for data"
    ),
    "to the CPU spikingbrain_train/training/callbacks/slow_ranks.py:_gathered": "how long ranks compute",
    "to the CPU spikingbrain_train/training/callbacks/expert_load.py:_collect": "tokens of experts",
    "to the CPU spikingbrain_train/training/callbacks/replicated_experts.py:report_due": "loads of ranks",
    "to the CPU spikingbrain_train/training/callbacks/activation_sparsity.py:report_due": "zeros",
    "_local_scalar_dense spikingbrain_train/training/callbacks/linear_transforms.py:report_due": (
        "whether anything was counted, once a kind of transform"
    ),
    "_local_scalar_dense spikingbrain_train/training/callbacks/linear_transforms.py:after_evaluation": (
        "the same, once a layer"
    ),
    "to the CPU spikingbrain_train/models/linears/spike_statistics.py:_mean": "each of the metrics of spikes",
    "to the CPU spikingbrain_train/models/linears/annealed.py:metrics": "those of INT8 numbers",
    "bincount spikingbrain_train/models/linears/spike_statistics.py:add": (
        "torch looks for the largest count, once a projection that is counted"
    ),
    "to the CPU spikingbrain_train/evaluation/held_out.py:held_out_cross_entropy": "once an evaluation",
    "to the CPU spikingbrain_train/evaluation/language_model.py:score": "once a batch of questions",
    "to the GPU spikingbrain_train/evaluation/megatron_language_model.py:forward_step": "the questions",
    "to the GPU spikingbrain_train/evaluation/megatron_language_model.py:_put": "where their answers are",
    "to the GPU spikingbrain_train/evaluation/megatron_language_model.py:_generate_by_step": "prompts, once",
    "to the GPU spikingbrain_train/evaluation/against_teacher/comparison.py:_kl_divergence": (
        "what is kept of the teacher"
    ),
    "to the CPU spikingbrain_train/evaluation/megatron_language_model.py:_generate_by_step": (
        "texts, once they are written"
    ),
    "_local_scalar_dense spikingbrain_train/evaluation/megatron_language_model.py:_all_ranks": (
        "whether all texts have ended, once a token"
    ),
    **{
        f"to the CPU spikingbrain_train/evaluation/against_teacher/{path}": "once a text of the teacher"
        for path in (
            "teacher_record.py:record_teacher",
            "comparison.py:compare",
            "comparison.py:_kl_divergence",
        )
    },
}
"""The same in a step that is reported, and in the evaluation behind it."""

ON_CPU = {
    "spikingbrain_train/data/loader.py:<genexpr>": "batches are cut on the CPU and copied from pinned memory",
    "spikingbrain_train/ops/host_numbers.py:on_device": "numbers of the host, copied from pinned memory",
    "spikingbrain_train/ops/softmax_attention/flex.py:_seen_text": "what queries see, once for each layout",
    "megatron/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu": "numbers of tokens",
    "megatron/transformer/moe/token_dispatcher.py:dispatch_postprocess": "numbers of tokens",
    "megatron/transformer/moe/token_dispatcher.py:combine_preprocess": "numbers of tokens",
    "megatron/tensor_parallel/random.py:backward": "numbers of tokens, of layers that are computed again",
    "megatron/tensor_parallel/random.py:fork": "states of random generators",
    "megatron/utils.py:local_multi_tensor_l2_norm": "norms of gradients, see above",
}
"""Where the CPU computes within a step, and on what."""

REPORT_ON_CPU = {
    "spikingbrain_train/evaluation/language_model.py:padded_tokens": "questions become batches",
    "spikingbrain_train/evaluation/megatron_language_model.py:forward_step": "on their way to the GPU",
    "spikingbrain_train/evaluation/megatron_language_model.py:_generate_by_step": "the same, of prompts",
    **{
        f"spikingbrain_train/evaluation/against_teacher/{path}": "what is kept of the teacher is compared"
        for path in (
            "teacher_record.py:mass_of_others",
            "comparison.py:compare",
            "comparison.py:_kl_divergence",
        )
    },
    **{
        f"spikingbrain_train/{path}": "what was counted becomes metrics"
        for path in (
            "models/feed_forwards/routing.py:unpack",
            "models/linears/spike_statistics.py:_mean",
            "models/linears/spike_statistics.py:share_up_to",
            "spiking/codings.py:<genexpr>",
            "spiking/codings.py:_bits_of",
            "spiking/codings.py:spikes_in",
            "training/callbacks/expert_load.py:_collect",
            "training/callbacks/expert_load.py:load_over_mean",
            "training/callbacks/expert_load.py:metrics",
        )
    },
}
"""The same in a step that is reported, and in the evaluation behind it."""

SAVE_WAITS = {
    "_local_scalar_dense spikingbrain_train/ops/finite.py:first_not_finite": "whether all is finite, once",
    "_local_scalar_dense spikingbrain_train/parallel/agreement.py:agreed_failure": "on all ranks",
    "_local_scalar_dense megatron/optimizer/optimizer.py:_extract_common_per_param_step": (
        "the step of AdamW, which torch keeps a parameter, with megatron-core's optimizer"
    ),
    "_local_scalar_dense megatron/optimizer/optimizer.py:sharded_state_dict": "the same",
    "_local_scalar_dense megatron/optimizer/distrib_optimizer.py:<listcomp>": "the same, of its shards",
    "to the CPU spikingbrain_train/checkpoint/partitioned_state.py:_step": "the same, of DeepSpeed's, once",
}
"""Where a save waits for the GPU until ranks tell each other what they write."""

SAVE_ON_CPU = {
    "spikingbrain_train/checkpoint/sharded_state.py:<dictcomp>": "states of random generators",
    "megatron/dist_checkpointing/strategies/torch.py:_mcore_to_dcp_compatible_tensor": "the same",
}
"""Where the CPU computes then."""

OFFLOADED = {
    **{
        f"deepspeed/runtime/zero/{path}": "gradients go to host memory, where their norm is taken"
        for path in (
            "stage_1_and_2.py:copy_grads_in_partition",
            "stage_1_and_2.py:update_offload_overflow_tracker",
            "stage_1_and_2.py:complete_grad_norm_calculation_for_cpu_offload",
            "stage_1_and_2.py:has_overflow",
            "stage3.py:partition_grads",
            "stage3.py:_offload_grad_partition_at_boundary",
            "stage3.py:_finalize_offload_gradient_accumulation",
            "stage3.py:complete_grad_norm_calculation_for_cpu_offload",
        )
    },
    "deepspeed/runtime/utils.py:combine_grad_norm_groups": "the same",
    **{
        f"deepspeed/{path}": "weights and moments are there, and the update with them"
        for path in (
            "runtime/zero/stage_1_and_2.py:unscale_and_clip_grads",
            "runtime/zero/stage_1_and_2.py:_optimizer_step",
            "runtime/zero/stage_1_and_2.py:step",
            "runtime/zero/stage3.py:unscale_and_clip_grads",
            "runtime/zero/stage3.py:step_with_gradscaler",
            "runtime/zero/stage3.py:_reassign_or_swap_out_partitioned_parameters",
            "utils/tensor_fragment.py:<dictcomp>",
        )
    },
    "spikingbrain_train/training/engines/deepspeed.py:begin_gradients": "gradients there begin at zero",
    "spikingbrain_train/training/engines/zero_three.py:begin_gradients": "the same",
}
"""Where the CPU waits and computes besides with `parallel.zero.offload_optimizer`."""

WIDE = {
    "spikingbrain_train/models/feed_forwards/moe/router.py:forward": "routers compute in float32",
    "spikingbrain_train/models/feed_forwards/moe/router.py:backward": "the same",
    "spikingbrain_train/ops/gated_linear_attention/naive.py:gated_linear_attention_step": (
        "states of texts that are written"
    ),
    "spikingbrain_train/ops/gated_linear_attention/end_state.py:gated_linear_attention_end_state": (
        "states that travel between context-parallel ranks"
    ),
    "spikingbrain_train/ops/softmax_attention/torch_sdpa.py:bidirectional_attention": (
        "queries of sinks; torch's SDPA has no fused form on the meta device"
    ),
    "megatron/pipeline_parallel/schedules.py:backward_step": "gradients of these",
    "megatron/pipeline_parallel/schedules.py:custom_backward": "the same where stages free what they sent",
    "megatron/tensor_parallel/random.py:backward": "gradients of these in layers that are computed again",
}
"""Where matrices of float32 are multiplied, and why."""


def taken_steps(
    runs: Sequence[str], *, torch_folder: Path | None = None, timeout: float = 570
) -> dict[str, Any]:
    """What the steps of runs did, by run and rank, from one process without patches for CPUs.

    Args:
        runs: as in RUNS.
        torch_folder: torch's CUDA build, as scripts/setup_cuda_build.sh leaves it; None has this torch.
        timeout: in seconds.
    """
    if version("megatron-core") != "0.16.1" or torch.__version__ < "2.13":
        pytest.skip("the tables here are of megatron-core 0.16.1 and torch 2.13")
    if find_spec("deepspeed") is None:
        pytest.skip("the extra deepspeed is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if torch_folder is not None:
        environment["PYTHONPATH"] = f"{torch_folder}:{ROOT}"
        environment["LD_PRELOAD"] = str(torch_folder / "libcuda.so.1")
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu.steps", *runs]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    return taken_steps(RUNS)


def places(found: Iterable[str]) -> set[str]:
    return {each.split(" ")[-1] for each in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", RUNS)
def test_a_step_stays_on_the_gpu_and_waits_only_where_it_has_to(run: str, steps: dict[str, Any]) -> None:
    check_run(run, steps)


def check_run(run: str, steps: dict[str, Any]) -> None:
    """What the steps of a run did is in the tables."""
    of_run = {name: found for name, found in steps.items() if name.startswith(f"{run}, ")}
    assert of_run
    for name, found in of_run.items():
        assert not found["off the GPU"], name
        assert not found["patches for CPUs"], name
        assert not _unexplained(found, is_offloaded="offload_optimizer" in run), name
        if run.endswith(" reported"):
            assert not _unexplained(found["report"], is_report=True), name
            save = found["save"]
            assert not save["mixed"] and not save["products"], name
            assert set(save["waits"]) <= set(SAVE_WAITS) and places(save["on_cpu"]) <= set(SAVE_ON_CPU), name
            assert found["pieces"]["tensors"] > 0, name
        assert found["saved"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", FP8)
def test_linears_multiply_in_fp8_with_the_recipe_that_is_asked_for(run: str, steps: dict[str, Any]) -> None:
    """Of every layer but for those in bf16; tests/fake_gpu/engine.py says what a product has to be."""
    for name, found in steps.items():
        if name.startswith(f"{run}, "):
            recipes = {recipe for recipe, _, _ in found["engine"]}
            assert recipes == ({FP8[run], None} if "in_bf16" in run else {FP8[run]}), name
            shapes = {tuple(weight) for recipe, _, weight in found["engine"] if recipe is not None}
            assert len(shapes) >= 3, "q, k and v, output, and both of a feed-forward"
            # Each adds its weight's gradient to megatron-core's sum, which DeepSpeed does not have.
            weights = {tuple(weight) for _, _, weight in found["engine"]}
            assert {tuple(each) for each in found["added"]} == (set() if "zero" in run else weights), name


def _unexplained(found: dict[str, Any], *, is_offloaded: bool = False, is_report: bool = False) -> set[str]:
    """What a GPU would not like, and no table here has."""
    waits, on_cpu = set(WAITS), set(ON_CPU)
    if is_report:
        waits, on_cpu = waits | set(REPORT_WAITS), on_cpu | set(REPORT_ON_CPU)
    unknown = {*found["mixed"], *(set(found["waits"]) - waits)}
    # A list on its way to the GPU is a tensor of the CPU first; torch's CUDA build tells of that, too.
    computed = (
        places(found["on_cpu"]) - on_cpu - places(each for each in waits if each.startswith("to the GPU"))
    )
    if is_offloaded:
        unknown = {each for each in unknown if each.split(" ")[-1] not in OFFLOADED}
        computed -= set(OFFLOADED)
    # What is multiplied in float32 in a bf16 run takes many times as long.
    return unknown | computed | (places(wide(found)) - set(WIDE))


def wide(found: dict[str, Any]) -> set[str]:
    return {each for each in found["products"] if not each.startswith("bfloat16 ")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_reason_is_of_a_wait_that_there_is(steps: dict[str, Any]) -> None:
    host = {name: found for name, found in steps.items() if "offload_optimizer" in name}
    plain = [found for name, found in steps.items() if name not in host]
    reports = [found["report"] for found in plain if "report" in found]
    waits = {each for found in plain for each in found["waits"]}
    on_cpu = {each for found in plain for each in places(found["on_cpu"])}
    assert set(WAITS) == waits
    assert set(ON_CPU) == on_cpu
    assert set(REPORT_WAITS) == {each for found in reports for each in found["waits"]} - waits
    assert set(REPORT_ON_CPU) == {each for found in reports for each in places(found["on_cpu"])} - on_cpu
    saves = [found["save"] for found in plain if "save" in found]
    assert set(SAVE_WAITS) == {each for found in saves for each in found["waits"]}
    assert set(SAVE_ON_CPU) == {each for found in saves for each in places(found["on_cpu"])}
    assert set(OFFLOADED) == {
        *(each for found in host.values() for each in places(set(found["waits"]) - waits)),
        *(each for found in host.values() for each in places(found["on_cpu"]) - on_cpu),
    }
    assert set(WIDE) == {place for found in (*steps.values(), *reports) for place in places(wide(found))}
    (tokens, _), (votes, _) = ((name, why) for name, why in WAITS.items() if "once a step" in why)
    for name, found in steps.items():
        assert found["waits"][votes] == 1
        assert found["waits"][tokens] == (2 if "virtual" in name else 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", FUSED_RUNS)
def test_fused_kernels_multiply_and_wait_less(run: str, steps: dict[str, Any]) -> None:
    plain = {
        name: found for name, found in steps.items() if name.startswith((f"{run}, ", f"{run} reported,"))
    }
    assert plain
    norm, each = "get_grad_norm_fp32", "local_multi_tensor_l2_norm"
    in_linears = "bfloat16 megatron/tensor_parallel/layers.py:backward"
    for name, before in plain.items():
        rank = name.rpartition(", ")[2]
        after = steps[f"{run} {FUSED}, {rank}"]
        products = before["products"][in_linears], after["products"][in_linears]
        assert products[1] < products[0], name
        if "align" not in run and "mamba" not in run:  # every linear trains, and all were plain ones
            assert products[1] == products[0] / 2, name
        waits, fewer = before["waits"], after["waits"]
        assert not any(word in wait for wait in fewer for word in ("permute", each))
        assert any(norm in wait for wait in fewer) and any(each in wait for wait in waits)
        for wait in fewer:
            assert fewer[wait] <= waits[wait], wait
        if "76b" in run:
            moves = "to the CPU megatron/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu"
            assert fewer[moves] < waits[moves] and any("permute" in wait for wait in waits)


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
