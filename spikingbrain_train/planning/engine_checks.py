"""What the engine of a run cannot do, said before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from spikingbrain_train.config.parallel import WEIGHTS_STAGE, EngineKind
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import OptimizerKind, RunConfig

_DEEPSPEED = "parallel.engine=deepspeed"
_FSDP = "parallel.engine=fsdp"
_SUMS = "set_force_sum_reduction_for_comms"
"""The method of torch's FSDP2 by which gradients are summed and not averaged."""


def check_engine(config: RunConfig) -> None:
    """What engines other than megatron-core cannot do. Raises ConfigurationError."""
    if config.parallel.engine is EngineKind.deepspeed:
        _check_deepspeed(config)
    if config.parallel.engine is EngineKind.fsdp:
        _check_fsdp(config)


def _check_deepspeed(config: RunConfig) -> None:
    parallel = config.parallel
    degrees = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }
    _check_degrees(_DEEPSPEED, degrees, "data- and context-parallel ranks alone")
    require(
        not parallel.overlap_param_gather,
        f"{_DEEPSPEED} gathers weights at the end of every update; set parallel.overlap_param_gather=false",
    )
    require(
        parallel.zero.stage > 1 or not parallel.overlap_grad_reduce,
        f"{_DEEPSPEED} with parallel.zero.stage=1 reduces gradients behind the last backward pass; set "
        "parallel.overlap_grad_reduce=false, or parallel.zero.stage=2",
    )
    _check_what_shards(config, _DEEPSPEED)
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


def _check_fsdp(config: RunConfig) -> None:
    parallel = config.parallel
    degrees = {
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
    }
    _check_degrees(_FSDP, degrees, "data-, context- and tensor-parallel ranks alone")
    require(
        parallel.expert_tensor_size == parallel.tensor_model_parallel_size,
        f"{_FSDP} spreads experts over the ranks that it spreads all else over, but "
        f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_size} is not "
        f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}; set it to null, or "
        "parallel.engine=megatron",
    )
    require(
        not parallel.overlap_param_gather,
        f"{_FSDP} gathers a layer's weights while the one before computes, always; set "
        "parallel.overlap_param_gather=false",
    )
    _check_what_shards(config, _FSDP)
    require(
        config.dry_run or _torch_sums(),
        f"{_FSDP} needs a release of torch whose FSDP2 has {_SUMS}; update torch, or set "
        "parallel.engine=megatron",
    )


def _check_what_shards(config: RunConfig, engine: str) -> None:
    """What an engine that cuts parameters into parts cannot do."""
    require(
        not config.checkpoint.memory_interval,
        f"{engine} keeps no checkpoints in the memory of other hosts; set checkpoint.memory_interval=0 "
        "(checkpoint.async_save=true lets checkpoints on the disk be written beside the training)",
    )
    require(
        config.optimizer.kind is OptimizerKind.adamw,
        f"{engine} cuts parameters into parts, and optimizer.kind={config.optimizer.kind.value} "
        "updates whole matrices; set parallel.engine=megatron, or optimizer.kind=adamw",
    )


def _check_degrees(engine: str, degrees: Mapping[str, int], ranks: str) -> None:
    for name, degree in degrees.items():
        require(
            degree == 1,
            f"{engine} spreads a run over {ranks}, but "
            f"parallel.{name}={degree}; set it to 1, or parallel.engine=megatron",
        )


def _torch_sums() -> bool:
    """Read off torch's source: to import it takes seconds."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    source = Path(torch.origin).parent / "distributed/fsdp/_fully_shard/_fully_shard.py"
    return source.exists() and _SUMS in source.read_text(encoding="utf-8")
