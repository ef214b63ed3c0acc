"""A cache of the teacher's logits that is to be written: what it will be of, what it takes, what is left.

Pure Python: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spikingbrain_train.architecture.layers import dense_source
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.costs import forward_flops_per_token
from spikingbrain_train.planning.duration import speed_of
from spikingbrain_train.planning.file_checks import check_data, check_output_folder
from spikingbrain_train.planning.parallel_checks import check_sequence_split, check_split, check_world_size
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.planning.teacher_cache import (
    TEACHER,
    cache_identity,
    check_identity,
    teacher_digest,
)
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.reporting.quantities import quantity, size
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from spikingbrain_train.storage.teacher_cache import (
    CACHE_FILE,
    CacheLayout,
    check_shard,
    read_cache_file,
    shard_path,
    shards_of,
    write_cache_file,
)


@dataclass(frozen=True)
class CacheRequest:
    """A cache that is to be written, or gone on with."""

    config: RunConfig
    """The run that will read it, with the teacher."""
    folder: Path
    layout: CacheLayout

    @property
    def samples(self) -> int:
        """Those of the whole stage."""
        return self.config.stage.samples

    def describe(self, world_size: int) -> list[tuple[str, str]]:
        """What it takes, for a dry run: names and what is to be said of each."""
        config, layout = self.config, self.layout
        shards, missing = layout.shards(self.samples), missing_shards(self)
        tokens = self.samples * layout.seq_length
        left = sum(len(shard) for shard in missing) * layout.seq_length
        flops = forward_flops_per_token(dense_source(config.model), layout.seq_length)
        return [
            ("teacher", f"{config.stage.teacher}"),
            ("samples", f"{self.samples:,} of {layout.seq_length:,} tokens, {quantity(tokens)} tokens"),
            (
                "kept",
                f"the {layout.top} likeliest tokens and {layout.drawn} drawn among the others, "
                f"{layout.token_bytes:,} bytes a token",
            ),
            ("on disk", f"{size(tokens * layout.token_bytes)} in {len(shards):,} files in {self.folder}"),
            (
                "left",
                f"{len(missing):,} files, {quantity(left)} tokens, {left * flops:.3g} FLOPs of the teacher",
            ),
            ("time", self._time(left * flops, world_size)),
        ]

    def _time(self, flops: float, world_size: int) -> str:
        speed = speed_of(plan_run(self.config, world_size))
        if speed is None:
            return "not known here; cluster.measured_in=RUN takes the speed of a run on this machine"
        seconds = flops / (speed.tflops * 1e12 * world_size)
        return f"about {format_duration(seconds)} at {speed.tflops:.3g} TFLOP/s a rank ({speed.source})"


def open_cache(request: CacheRequest) -> None:
    """Say in a new folder what it will be of; hold one that is there to it.

    Raises:
        DataError, CheckpointError: the folder holds a cache of something else.
    """
    folder = request.folder
    identity = cache_identity(request.config)
    identity[TEACHER] = teacher_digest(str(request.config.stage.teacher))
    if not (folder / CACHE_FILE).exists():
        write_cache_file(folder, identity, request.layout)
        return
    named = f"--output {folder}"
    stored, layout = read_cache_file(folder, named)
    check_identity(stored, identity, named)
    if layout != request.layout:
        raise DataError(
            f"{named} keeps {layout.top} tokens and {layout.drawn} drawn ones, not {request.layout.top} and "
            f"{request.layout.drawn}; write the whole of a cache with the same --top-k and --tail-samples"
        )


def missing_shards(request: CacheRequest) -> list[range]:
    """The samples of the files that are still to be written; one of a shorter run, or cut short, is anew."""
    there = shards_of(request.folder)
    shards = request.layout.shards(request.samples)
    return [shard for shard in shards if not _is_written(request, shard, there.get(shard.start))]


def _is_written(request: CacheRequest, shard: range, found: range | None) -> bool:
    if found is None or len(found) < len(shard):
        return False
    try:
        check_shard(shard_path(request.folder, found), request.layout, found)
    except DataError:
        return False
    return True


def request_cache(config: RunConfig, folder: Path, *, top: int, drawn: int, world_size: int) -> CacheRequest:
    """Hold what is asked for against the files and the ranks.

    Args:
        config: the run that will read the cache.
        folder: of the cache.
        top: likeliest tokens to keep.
        drawn: tokens to draw among the others.
        world_size: ranks that write it.

    Raises:
        ConfigurationError, CheckpointError, DataError: one sentence that says what to change.
    """
    stage, parallel = config.stage, config.parallel
    check_fields(config)
    kind, teacher = kind_of(stage), stage.teacher
    require(
        "stage.distillation.cache" in kind.all_settings(stage),
        f"stage.kind={stage.kind} reads no cache of a teacher's logits; choose stage=distill, or an "
        f"experiment with it",
    )
    require(
        teacher is not None,
        "stage.teacher is null; set stage.teacher=<folder of a checkpoint converted with conversion dense>",
    )
    require(
        parallel.context_parallel_size == 1,
        f"parallel.context_parallel_size={parallel.context_parallel_size} splits sequences, which a cache is "
        f"not written with; set it to 1, and spread the teacher with tensor or pipeline parallelism",
    )
    for name, number in (("top-k", top), ("tail-samples", drawn)):
        require(number >= 1, f"--{name} is {number}; give at least 1")
    check_world_size(parallel, world_size)
    model = read_stored_model(latest_checkpoint(str(teacher), "stage.teacher"))
    kind.check_teacher(stage, config.model, model, parallel, f"stage.teacher={teacher}")
    require(top < model.vocab_size, f"--top-k is {top}; give less than the vocabulary of {model.vocab_size}")
    require(
        stage.seq_length <= model.max_position_embeddings,
        f"stage.seq_length={stage.seq_length} is longer than the {model.max_position_embeddings} positions "
        f"of stage.teacher={teacher}; shorten it",
    )
    check_split(model, parallel)
    check_sequence_split(stage.seq_length, model, parallel)
    check_data(config.data)
    check_output_folder(folder, "--output")
    layout = CacheLayout.of(top, drawn, stage.seq_length, model.vocab_size, stage.samples)
    if not (folder / CACHE_FILE).exists():
        return CacheRequest(config, folder, layout)
    _, stored = read_cache_file(folder, f"--output {folder}")
    request = CacheRequest(config, folder, replace(layout, shard_samples=stored.shard_samples))
    open_cache(request)
    return request


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """The rows of a dry run as text."""
    return "\n".join(f"{name:<10}{text}" for name, text in rows)
