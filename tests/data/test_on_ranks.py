"""Datasets and loaders in a process group: nothing is communicated, and all ranks agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import DataConfig
from spikingbrain_train.data.gpt_dataset import build_datasets
from spikingbrain_train.data.loader import build_data_loader
from spikingbrain_train.errors import DataError

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups
    from tests.distributed.pool import RankPool


def _tokens_of_this_rank(groups: ProcessGroups, prefix: str, consumed_samples: int) -> list[torch.Tensor]:
    train, _ = build_datasets(DataConfig(train=[prefix]), 8, 24)
    loader = build_data_loader(
        train,
        consumed_samples=consumed_samples,
        micro_batch_size=2,
        data_parallel_rank=groups.data_parallel_rank,
        data_parallel_size=groups.data_parallel_size,
    )
    return [batch["tokens"] for batch in loader]


def _error_of_this_rank(groups: ProcessGroups, prefix: str) -> str:
    try:
        build_datasets(DataConfig(train=[prefix]), 8, 24)
    except DataError as error:
        return str(error)
    return "no error"


def test_two_ranks_together_read_what_one_reads(ranks: RankPool, write_tokens) -> None:
    prefix = write_tokens("counted", [range(0, 50), range(50, 203)])
    alone = ranks.run(_tokens_of_this_rank, prefix, 8, world_size=1, parallel=ParallelConfig())[0]
    together = ranks.run(_tokens_of_this_rank, prefix, 8, world_size=2, parallel=ParallelConfig())
    interleaved = [batch for step in zip(*together, strict=True) for batch in step]
    assert torch.equal(torch.cat(interleaved), torch.cat(alone))


def test_every_rank_names_the_same_damage(ranks: RankPool, write_tokens) -> None:
    short = write_tokens("short", [range(8)])
    errors = ranks.run(_error_of_this_rank, short, world_size=2, parallel=ParallelConfig())
    assert errors[0] == errors[1]
    assert "short has 8 tokens but one sample needs 9" in errors[0]
