"""A Megatron checkpoint to evaluate or to generate from, and on how many ranks. Decided without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from spikingbrain_train.architecture.layers import feed_forwards_of, has_experts
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import load_run_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import AcceleratorKind, ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.planning.parallel_checks import check_split, check_world_size
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    RUN_CONFIG_FILE,
    is_iteration_folder,
    iteration_of,
)
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.tokenizer_files import has_tokenizer

_SETTING = re.compile(r"parallel(\.\w+)*=")
_PRECISIONS = {"auto": Precision.auto, "float32": Precision.fp32, "bfloat16": Precision.bf16}


@dataclass(frozen=True)
class CheckpointRequest:
    """What is built, from which weights."""

    checkpoint: Path
    """Folder of one checkpoint."""
    named: Path
    """As the user named it."""
    model: ModelConfig
    """The network, as it is stored."""
    run: RunConfig | None
    """The run that wrote it; None for a conversion's output."""
    parallel: ParallelConfig
    """Degrees, which have nothing to do with those that wrote it."""
    device: AcceleratorKind
    precision: Precision
    """auto is decided by all ranks together."""
    flag: str = "--model"
    """That named it, for sentences."""

    @property
    def iteration(self) -> int | None:
        """Optimizer steps of the run that wrote it; None where its folder has another name."""
        return iteration_of(self.checkpoint) if is_iteration_folder(self.checkpoint) else None

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer of its data: that of its run, or that which travels with it; None without."""
        named = None if self.run is None else self.run.data.tokenizer
        if named is not None and Path(named).exists():
            return Path(named)
        folder = self.checkpoint / HF_SOURCE_FOLDER
        return folder if has_tokenizer(folder) else None


def without_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line less what is written as to train (``parallel=tp2``, ``parallel.x=2``), and those words.

    Flags that take several values would else take them, too.
    """
    kept: list[str] = []
    settings: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_setting = _SETTING.match(argument) and previous != "--prompt"
        (settings if is_setting else kept).append(argument)
    return kept, settings


def parallel_of(settings: Sequence[str]) -> ParallelConfig:
    """Degrees from words such as ``tp2_pp2`` (of conf/parallel) and ``context_parallel_size=2``.

    Both may stand behind ``parallel=`` and ``parallel.``, as they do to train.

    Raises:
        ConfigurationError: there is no such layout or setting, or its value does not fit.
    """
    if not settings:
        return ParallelConfig()
    overrides = []
    for setting in settings:
        if _SETTING.match(setting):
            overrides.append(setting)
        else:
            overrides.append(f"parallel.{setting}" if "=" in setting else f"parallel={setting}")
    layouts = [override for override in overrides if override.startswith("parallel=")]
    require(len(layouts) < 2, f"--parallel names {len(layouts)} layouts ({', '.join(layouts)}); name one")
    parallel = cast(ParallelConfig, OmegaConf.to_object(compose_run(overrides).parallel))
    check_fields(parallel, "parallel.")
    require(
        parallel.virtual_pipeline_model_parallel_size is None,
        f"--parallel virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size} "
        "shortens the wait between forward and backward passes, and reading a checkpoint has no such passes; "
        "leave it out, whatever trained the checkpoint",
    )
    return parallel


def request_checkpoint(
    folder: Path,
    *,
    settings: Sequence[str],
    device: str,
    dtype: str,
    world_size: int,
    flag: str = "--model",
    is_teacher: bool = False,
) -> CheckpointRequest:
    """Read what lies in ``folder`` beside its weights, and hold it against the ranks that were started.

    Args:
        folder: one checkpoint, a folder of them or a run's; the newest is taken.
        settings: words of --parallel.
        device: of --device.
        dtype: of --dtype.
        world_size: ranks that were started, or will be.
        flag: that names the folder, for sentences.
        is_teacher: the degrees are another model's, whose experts this one need not have.

    Raises:
        CheckpointError: there is no complete checkpoint, or of unknown kinds.
        ConfigurationError: degrees that do not fit the network or the ranks, or a dtype that is none of ours.
    """
    if dtype not in _PRECISIONS:
        raise ConfigurationError(
            f"--dtype {dtype} is for Hugging Face folders; Megatron checkpoints take float32 or bfloat16"
        )
    checkpoint = resolve_checkpoint(folder, flag)
    model = read_stored_model(checkpoint)
    try:
        check_model(model)
    except ConfigurationError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    stored_run = checkpoint / RUN_CONFIG_FILE
    run = load_run_config(stored_run) if stored_run.is_file() else None
    parallel = parallel_of(settings)
    check_world_size(parallel, world_size)
    check_split(model, _for_teacher(model, parallel) if is_teacher else parallel)
    return CheckpointRequest(
        checkpoint, folder, model, run, parallel, AcceleratorKind(device), _PRECISIONS[dtype], flag
    )


def request_in_run(folder: Path, run: RunConfig, flag: str) -> CheckpointRequest:
    """A checkpoint beside the model of a run, in the run's topology and precision.

    Args:
        folder: as for :func:`request_checkpoint`.
        run: that goes on.
        flag: that names the folder, for sentences.

    Raises:
        CheckpointError, ConfigurationError: as for :func:`request_checkpoint`.
    """
    checkpoint = resolve_checkpoint(folder, flag)
    model = read_stored_model(checkpoint)
    check_split(model, _for_teacher(model, run.parallel))
    return CheckpointRequest(
        checkpoint, folder, model, None, run.parallel, run.cluster.accelerator, run.precision, flag
    )


def _for_teacher(model: ModelConfig, parallel: ParallelConfig) -> ParallelConfig:
    """The degrees as a model without experts sees them: ranks of experts are replicas of it."""
    if has_experts(model):
        return parallel
    return replace(parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=None)


def for_reading(request: CheckpointRequest) -> CheckpointRequest:
    """The same, as it reads texts of any length: what it says to one depends on no other beside it.

    Experts drop no token. Sequence parallelism is left out where no context-parallel ranks share a text, so
    that the model can read token by token, too.
    """
    parallel, model = request.parallel, request.model
    for kind in feed_forwards_of(model):
        model = kind.without_dropping(model)
    if parallel.context_parallel_size == 1:
        parallel = replace(parallel, sequence_parallel=False)
    return replace(request, model=model, parallel=parallel)


def for_decoding(request: CheckpointRequest, world_size: int) -> CheckpointRequest:
    """The same, as it reads a text token by token.

    Sequence parallelism is left out: it splits a sequence, and one token cannot be split. Context-parallel
    ranks read a prompt together, and what follows each by itself. Experts drop no token.

    Raises:
        ConfigurationError: degrees that decoding cannot use.
    """
    parallel = request.parallel
    replicas = world_size // parallel.model_parallel_size
    require(
        replicas in (1, parallel.expert_model_parallel_size),
        f"{world_size} ranks are {replicas} copies of a model over "
        f"{parallel.tensor_model_parallel_size} tensor x {parallel.pipeline_model_parallel_size} pipeline "
        f"ranks, and all would write the same text; start {parallel.model_parallel_size}, or raise "
        f"parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size",
    )
    return for_reading(replace(request, parallel=replace(parallel, sequence_parallel=False)))
