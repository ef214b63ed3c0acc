"""What the engine of a run cannot do, said before torch is imported."""

from __future__ import annotations

from importlib.util import find_spec

from spikingbrain_train.config.parallel import WEIGHTS_STAGE, EngineKind, ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import OptimizerKind, RunConfig

_DEEPSPEED = "parallel.engine=deepspeed"


def check_engine(config: RunConfig) -> None:
    """DeepSpeed shards over data- and context-parallel ranks alone. Raises ConfigurationError."""
    parallel = config.parallel
    if parallel.engine is not EngineKind.deepspeed:
        return
    _check_degrees(parallel)
    require(
        not parallel.overlap_param_gather,
        f"{_DEEPSPEED} gathers weights at the end of every update; set parallel.overlap_param_gather=false",
    )
    require(
        parallel.zero.stage > 1 or not parallel.overlap_grad_reduce,
        f"{_DEEPSPEED} with parallel.zero.stage=1 reduces gradients behind the last backward pass; set "
        "parallel.overlap_grad_reduce=false, or parallel.zero.stage=2",
    )
    require(
        not config.checkpoint.memory_interval,
        f"{_DEEPSPEED} keeps no checkpoints in the memory of other hosts; set checkpoint.memory_interval=0 "
        "(checkpoint.async_save=true lets checkpoints on the disk be written beside the training)",
    )
    require(
        config.optimizer.kind is OptimizerKind.adamw,
        f"{_DEEPSPEED} cuts parameters into flat parts, and optimizer.kind={config.optimizer.kind.value} "
        "updates whole matrices; set parallel.engine=megatron, or optimizer.kind=adamw",
    )
    require(
        parallel.zero.stage < WEIGHTS_STAGE or parallel.recompute_expert_tokens is None,
        f"{_DEEPSPEED} with parallel.zero.stage=3 gathers weights whenever a module computes, on all ranks "
        "together, and experts of parallel.recompute_expert_tokens do so on some of them; set that to null, "
        "or parallel.zero.stage=2",
    )
    require(
        config.dry_run or find_spec("deepspeed") is not None,
        f"{_DEEPSPEED} needs the package deepspeed, which is not installed; run pip install "
        "'spikingbrain-train[deepspeed]', or set parallel.engine=megatron",
    )


def _check_degrees(parallel: ParallelConfig) -> None:
    degrees = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }
    for name, degree in degrees.items():
        require(
            degree == 1,
            f"{_DEEPSPEED} spreads a run over data- and context-parallel ranks alone, but "
            f"parallel.{name}={degree}; set it to 1, or parallel.engine=megatron",
        )
