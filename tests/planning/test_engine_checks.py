"""What DeepSpeed and FSDP cannot do is refused before torch is imported; plans know what ranks keep."""

from __future__ import annotations

import pytest

from spikingbrain_train.architecture.sizes import FP32
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning import engine_checks
from spikingbrain_train.planning.engine_checks import check_engine
from spikingbrain_train.planning.unread_settings import unread_settings
from tests.planning.runs import plan_of

DEEPSPEED = "model=tiny_hybrid parallel.engine=deepspeed"
FSDP = "model=tiny_hybrid parallel.engine=fsdp"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("parallel.tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size=2; set it to 1, or"),
        ("parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2; set it to 1"),
        ("model=tiny_76b parallel.expert_model_parallel_size=2", "expert_model_parallel_size=2; set it to 1"),
        ("model=tiny_76b parallel.expert_tensor_parallel_size=2", "expert_tensor_parallel_size=2; set it to"),
        (
            "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true "
            "parallel.use_distributed_optimizer=true",
            "set parallel.overlap_param_gather=false",
        ),
        ("parallel.overlap_param_gather=true", "set parallel.overlap_param_gather=false"),
        (
            "model=tiny_76b parallel.zero.stage=3 parallel.recompute_expert_tokens=9",
            "set that to null, or parallel.zero.stage=2",
        ),
        ("parallel.zero.stage=1 parallel.overlap_grad_reduce=true", "set parallel.overlap_grad_reduce=false"),
        ("checkpoint.memory_interval=5", "set checkpoint.memory_interval=0"),
        ("optimizer=muon_cosine", "updates whole matrices; set parallel.engine=megatron"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_setting_to_change(settings: str, said: str) -> None:
    config = to_run_config(compose_run([*DEEPSPEED.split(), *settings.split(), "dry_run=true"]))
    with pytest.raises(ConfigurationError) as refused:
        check_engine(config)
    assert "parallel.engine=deepspeed" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2; set it to 1"),
        ("model=tiny_76b parallel.expert_model_parallel_size=2", "expert_model_parallel_size=2; set it to 1"),
        (
            "model=tiny_76b parallel.tensor_model_parallel_size=2 parallel.expert_tensor_parallel_size=1",
            "expert_tensor_parallel_size=1 is not parallel.tensor_model_parallel_size=2; set it to null",
        ),
        (
            "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true "
            "parallel.use_distributed_optimizer=true",
            "set parallel.overlap_param_gather=false",
        ),
        ("parallel.overlap_param_gather=true", "set parallel.overlap_param_gather=false"),
        ("checkpoint.memory_interval=5", "set checkpoint.memory_interval=0"),
        ("optimizer=muon_cosine", "updates whole matrices; set parallel.engine=megatron"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_with_the_setting_to_change(settings: str, said: str) -> None:
    config = to_run_config(compose_run([*FSDP.split(), *settings.split(), "dry_run=true"]))
    with pytest.raises(ConfigurationError) as refused:
        check_engine(config)
    assert "parallel.engine=fsdp" in str(refused.value) and said in str(refused.value)


def test_fsdp_takes_tensor_parallelism_and_a_bound_on_what_experts_keep() -> None:
    degrees = "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true"
    settings = (
        f"model=tiny_76b parallel.engine=fsdp {degrees} parallel.recompute_expert_tokens=9 dry_run=true"
    )
    check_engine(to_run_config(compose_run(settings.split())))


def test_a_release_of_torch_that_cannot_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "_SUMS", "a method that no release has")
    config = to_run_config(compose_run([*FSDP.split(), "output_dir=out"]))
    with pytest.raises(ConfigurationError, match="update torch, or set parallel.engine=megatron"):
        check_engine(config)


def test_a_missing_package_is_said_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "find_spec", lambda name: None)
    config = to_run_config(compose_run([*DEEPSPEED.split(), "output_dir=out"]))
    with pytest.raises(ConfigurationError, match=r"pip install 'spikingbrain-train\[deepspeed\]'"):
        check_engine(config)


def test_its_settings_have_no_effect_with_the_other_engine() -> None:
    config = to_run_config(compose_run(["model=tiny_hybrid", "parallel.zero.stage=1", "dry_run=true"]))
    (note,) = (each for each in unread_settings(config) if each.name.startswith("parallel."))
    assert note.describe().startswith("parallel.zero.stage=1 has no effect: it is DeepSpeed's")
    kept = "parallel.fsdp.reshard_after_forward=false"
    config = to_run_config(compose_run(["model=tiny_hybrid", kept, "dry_run=true"]))
    (note,) = (each for each in unread_settings(config) if each.name.startswith("parallel."))
    assert note.describe().startswith(f"{kept} has no effect: it is FSDP's")
    overlap = "parallel.overlap_grad_reduce=true"
    config = to_run_config(compose_run([*FSDP.split(), overlap, "dry_run=true"]))
    (note,) = (each for each in unread_settings(config) if each.name.startswith("parallel."))
    assert note.describe().startswith(f"{overlap} has no effect: parallel.engine=fsdp always reduces")


@pytest.mark.parametrize(
    ("zero", "gradients", "state"),
    [
        ("parallel.zero.stage=1", 1.0, 3 / 4),
        ("parallel.zero.stage=2", 1.0 + 1 / 4, 3 / 4),  # a bucket as large as the model, and the share
        ("parallel.zero.stage=2 parallel.zero.offload_optimizer=true", 1.0, 0.0),
        ("parallel.zero.stage=3", 2.0 + 1 / 4, 3 / 4),  # the bucket and its copy
        ("parallel.zero.stage=3 parallel.zero.offload_optimizer=true", 2.0, 0.0),
    ],
)
def test_a_plan_counts_what_a_rank_keeps(zero: str, gradients: float, state: float) -> None:
    """In units of fp32 numbers a parameter, on four ranks; of ZeRO 3 all weights are gathered at a time."""
    plan = plan_of(f"{DEEPSPEED} precision=fp32 parallel.data_parallel_size=4", zero)
    memory = plan.fullest.memory
    parameters = memory.weights / FP32 / (1 + 1 / 4 if "stage=3" in zero else 1)
    assert memory.gradients == pytest.approx(gradients * FP32 * parameters)
    assert memory.optimizer == pytest.approx(state * FP32 * parameters)
