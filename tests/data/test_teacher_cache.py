"""Samples of a cache as a run reads them, from files that are whole and from damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from spikingbrain_train.data.teacher_cache import CachedTeacher, write_shard
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.teacher_cache import CacheLayout, check_shard, shard_path

LAYOUT = CacheLayout(top=3, drawn=2, seq_length=4, shard_samples=5, vocab_size=100)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Five samples, of which every number is another."""
    path, random = shard_path(tmp_path, range(5)), np.random.default_rng(0)
    ids = random.permutation(100).reshape(5, 4, 5).astype(np.uint16)
    values = -random.random((5, 4, 5)).astype(np.float16)
    write_shard(path, ids, values, random.random((5, 4)).astype(np.float32))
    check_shard(path, LAYOUT, range(5))
    return path


def test_samples_come_back_as_they_were_written(shard: Path) -> None:
    stored = load_file(shard)
    for index in (3, 0, 4):
        kept = CachedTeacher(shard.parent, LAYOUT).sample(index)
        assert torch.equal(kept.ids, torch.from_numpy(stored["ids"][index].astype(np.int32)))
        assert np.array_equal(kept.log_probabilities.numpy(), stored["log_probabilities"][index])
        assert kept.shares.sum(-1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["ids", "log_probabilities", "tail"])
def test_one_wrong_bit_is_named_with_its_sample_and_spoils_no_other(shard: Path, name: str) -> None:
    content, (first, last) = shard.read_bytes(), (3, 4)
    stored = load_file(shard)[name].tobytes()
    start = content.index(stored) + len(stored) * first // 5
    damaged = bytearray(content)
    damaged[start + 1] ^= 4
    shard.write_bytes(damaged)
    check_shard(shard, LAYOUT, range(5))  # what a start looks at is as it was
    teacher = CachedTeacher(shard.parent, LAYOUT)
    with pytest.raises(DataError, match=f"sample {first} of {shard} is damaged; remove the file"):
        teacher.sample(first)
    teacher.sample(last)


def test_files_of_earlier_releases_are_read_without_checksums(shard: Path) -> None:
    expected = CachedTeacher(shard.parent, LAYOUT).sample(1)
    save_file(load_file(shard), shard)
    assert all(map(torch.equal, CachedTeacher(shard.parent, LAYOUT).sample(1), expected))
