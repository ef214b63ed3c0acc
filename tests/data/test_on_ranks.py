"""Datasets and loaders in a process group: nothing is communicated, and all ranks agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spikingbrain_train.config.blend import blend
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import DataConfig, LongDocumentsConfig
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


SEQ = 4
PLAIN, PACKED = 64, 48
"""Samples of an epoch: of text as it lies, and of documents of two domains, some of them long."""
CHANGES = [(4, 8, 3), (2, 8, 2), (1, 16, 1), (4, 16, 2), (2, 8, 2), (1, 16, 3)]
"""(ranks, global batch, steps), start after start: 152 samples, two epochs of the larger dataset and more."""


def _read_on(
    groups: ProcessGroups, datasets: dict[str, DataConfig], consumed: int, batch: int, steps: int
) -> dict[str, list[list[int]]]:
    """What this rank reads of every step, each sample by its first token, which no other one begins with."""
    read = {}
    for name, data in datasets.items():
        train, _ = build_datasets(data, SEQ, consumed + steps * batch)
        loader = build_data_loader(
            train,
            consumed_samples=consumed,
            micro_batch_size=2,
            data_parallel_rank=groups.data_parallel_rank,
            data_parallel_size=groups.data_parallel_size,
            global_batch_size=batch,
        )
        micro_batches = list(loader)
        assert len(micro_batches) == steps * batch // (2 * groups.data_parallel_size)
        assert all(bool((each["loss_mask"].sum(1) > 0).all()) for each in micro_batches), "none is filled up"
        read[name] = [each["tokens"][:, 0].tolist() for each in micro_batches]
    return read


def test_another_number_of_ranks_and_another_global_batch_read_each_sample_once(
    ranks: RankPool, write_tokens
) -> None:
    plain = write_tokens("plain", [range(0, 100), range(100, PLAIN * SEQ + 1)])
    # 12 long documents of 4 samples each and their next token, in domains whose tokens leave nothing over.
    long = [range(1000 + 100 * number, 1000 + 100 * number + 4 * SEQ + 1) for number in range(12)]
    packed = write_tokens("packed", long, domains=["a", "b"] * 6)
    datasets = {
        "plain": DataConfig(train=[plain]),
        "packed": DataConfig(
            train=[packed], pack_by_domain=True, long_documents=LongDocumentsConfig(share=0.0)
        ),
        "blend": DataConfig(train=blend([plain, packed], [3, 1])),
    }
    read: dict[str, list[int]] = {name: [] for name in datasets}
    consumed = 0
    for world_size, batch, steps in CHANGES:
        every_rank = ranks.run(
            _read_on, datasets, consumed, batch, steps, world_size=world_size, parallel=ParallelConfig()
        )
        for name in datasets:
            for micro_step in zip(*(rank[name] for rank in every_rank), strict=True):
                read[name] += [first for micro_batch in micro_step for first in micro_batch]
        consumed += steps * batch
    assert consumed == 152 and all(len(each) == consumed for each in read.values())

    for name, of_epoch in (("plain", PLAIN), ("packed", PACKED)):
        epochs = [read[name][start : start + of_epoch] for start in range(0, consumed, of_epoch)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs), "each sample of an epoch once"
        assert len(epochs[0]) == of_epoch and sorted(epochs[0]) == sorted(epochs[1])
        assert epochs[0] != epochs[1], "in another order"
    parts = [[first for first in read["blend"] if (first < 1000) is of_plain] for of_plain in (True, False)]
    assert [len(part) for part in parts] == [114, 38], "the shares of the blend"
    for part, of_epoch in zip(parts, (PLAIN, PACKED), strict=True):
        epochs = [part[start : start + of_epoch] for start in range(0, len(part), of_epoch)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    # And as a run that was never started again reads them.
    for name, data in datasets.items():
        train, _ = build_datasets(data, SEQ, 1000)
        assert read[name] == [int(train[number]["tokens"][0]) for number in range(consumed)]


def test_every_rank_names_the_same_damage(ranks: RankPool, write_tokens) -> None:
    short = write_tokens("short", [range(8)])
    errors = ranks.run(_error_of_this_rank, short, world_size=2, parallel=ParallelConfig())
    assert errors[0] == errors[1]
    assert "short has 8 tokens but one sample needs 9" in errors[0]
