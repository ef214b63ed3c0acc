"""``bad_batches.jsonl``: which samples every rank had read where a batch was bad."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.data.loader import DataParallelBatchSampler
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.parallel.agreement import on_main_process
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.storage.durable_files import append_line_durably
from spikingbrain_train.training.stages.data import StageData
from spikingbrain_train.training.stages.losses import StepLosses

BAD_BATCHES_FILE = "bad_batches.jsonl"


@dataclass(frozen=True)
class Share:
    """What one rank has read of a batch."""

    rank: int
    data_parallel_rank: int
    samples: list[int]
    """In the order of the run, counted from 0; ranks that work on the same sequences have the same."""
    losses_are_finite: bool
    """Its own, before they are reduced."""
    gradients_are_finite: bool
    """After they are reduced, so that a NaN of one rank is in those of others, too."""


def shares_of(config: RunConfig, groups: ProcessGroups, consumed: int, losses: StepLosses) -> list[Share]:
    """What every rank has read of a batch, and whether it has made numbers of it; a collective of all ranks.

    Args:
        config: the run.
        groups: process groups.
        consumed: samples of all ranks before the batch.
        losses: of this rank.
    """
    stage = config.stage
    size = stage.batch_sizes.at(consumed)
    end = consumed + size
    sampler = DataParallelBatchSampler(
        end,
        consumed,
        stage.micro_batch_size,
        groups.data_parallel_rank,
        groups.data_parallel_size,
        size,
    )
    samples = [index for batch in islice(sampler, len(sampler)) for index in batch if index is not None]
    is_finite = bool(losses.sums.isfinite().all())
    norm = losses.grad_norm
    own = Share(
        groups.rank, groups.data_parallel_rank, samples, is_finite, norm is not None and math.isfinite(norm)
    )
    shares = [own] * groups.world_size
    torch.distributed.all_gather_object(shares, own)
    return shares


def not_finite_on(shares: list[Share]) -> list[int]:
    """Ranks where a NaN or an infinity began, as far as losses and gradients tell; none where all have it."""
    for signs in ("losses_are_finite", "gradients_are_finite"):
        ranks = [share.rank for share in shares if not getattr(share, signs)]
        if ranks:
            return ranks if len(ranks) < max(2, len(shares)) else []
    return []


def write_bad_batch(
    config: RunConfig,
    groups: ProcessGroups,
    data: StageData,
    shares: list[Share],
    what: dict[str, Any],
) -> Path:
    """Add a line: ``what``, the samples of every rank, and where each of them lies. All ranks together.

    Returns:
        The file.

    Raises:
        PlatformError: on every rank; it cannot be written.
    """
    path = Path(config.output_dir) / BAD_BATCHES_FILE

    def write() -> None:
        samples = sorted({sample for share in shares for sample in share.samples})
        line = {"time": round(time.time(), 3), **what, "read": [asdict(share) for share in shares]}
        append_line_durably(path, json.dumps({**line, "origins": data.origins(samples)}))

    try:
        on_main_process(write, groups)
    except OSError as error:
        raise PlatformError(
            f"{path} cannot be written ({error.strerror or error}); choose another output_dir or make room "
            "there."
        ) from error
    return path
