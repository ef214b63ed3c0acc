"""The teacher's kept tokens beside the samples of a run, read from the folder of a cache.

What a folder holds is said in :mod:`~spikingbrain_train.storage.teacher_cache`, what the tokens are in
:mod:`~spikingbrain_train.ops.kept_tokens`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spikingbrain_train.data.gpt_dataset import Sample, Samples
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.durable_files import replaced_durably
from spikingbrain_train.storage.teacher_cache import (
    CHECKSUMS,
    IDS,
    LOG_PROBABILITIES,
    TAIL,
    CacheLayout,
    shard_path,
    shards_of,
)


class KeptTokens(NamedTuple):
    """What stands for the teacher's distributions, [..., K] each; see ops' KeptDistillation."""

    ids: torch.Tensor
    """int32 as read, int64 in a micro-batch."""
    shares: torch.Tensor
    """float32 that add up to 1."""
    log_probabilities: torch.Tensor
    """float32."""


def write_shard(path: Path, ids: np.ndarray, log_probabilities: np.ndarray, tail: np.ndarray) -> None:
    """Write the file of some samples, with a checksum of each; it appears whole.

    Args:
        path: of the file.
        ids: [samples, tokens, kept] uint16 or int32.
        log_probabilities: the same shape, float16.
        tail: [samples, tokens] float32.
    """
    tensors = {IDS: ids, LOG_PROBABILITIES: log_probabilities, TAIL: tail}
    sums = "".join(_checksum(rows) for rows in zip(*tensors.values(), strict=True))
    with replaced_durably(path) as temporary:
        whole = {name: np.ascontiguousarray(each) for name, each in tensors.items()}
        save_file(whole, temporary, metadata={CHECKSUMS: sums})


def _checksum(rows: Sequence[np.ndarray]) -> str:
    """8 hexadecimal digits over the arrays, one behind the other."""
    found = 0
    for row in rows:
        found = zlib.crc32(row.tobytes(), found)
    return f"{found:08x}"


class CachedTeacher:
    """The samples of a cache by their number.

    Args:
        folder: of the cache; what it lacks was found before (planning/teacher_cache.py).
        layout: of its files.
    """

    def __init__(self, folder: Path, layout: CacheLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._shards = shards_of(folder)
        self._open: tuple[range, Any] | None = None

    def sample(self, index: int) -> KeptTokens:
        """[T, K] of sample ``index``. Raises DataError where it cannot be read."""
        first = index - index % self._layout.shard_samples
        samples = self._shards.get(first, range(first, first))
        path = shard_path(self._folder, samples)
        if index not in samples:
            raise DataError(f"{self._folder} lacks sample {index}; write it with spikingbrain-cache-teacher")
        try:
            if self._open is None or self._open[0] != samples:
                # One file at a time: samples are read in their order, or close to it.
                self._open = samples, safe_open(path, framework="numpy")
            file, row = self._open[1], index - samples.start
            ids, values, tail = (
                file.get_slice(name)[row : row + 1][0] for name in (IDS, LOG_PROBABILITIES, TAIL)
            )
            sums = (file.metadata() or {}).get(CHECKSUMS)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read sample {index} of {path}: {error}") from error
        if sums is not None and sums[8 * row : 8 * row + 8] != _checksum((ids, values, tail)):
            raise DataError(
                f"sample {index} of {path} is damaged; remove the file and let spikingbrain-cache-teacher "
                "write it again"
            )
        return self._with_shares(ids, values.astype(np.float32), tail)

    def _with_shares(self, ids: np.ndarray, values: np.ndarray, tail: np.ndarray) -> KeptTokens:
        """Probabilities were rounded to 16 bits on the disk; here they add up to what the tail leaves."""
        top = np.exp(values[:, : self._layout.top])
        top *= ((1 - tail) / top.sum(axis=1))[:, None]
        drawn = np.repeat(tail[:, None] / self._layout.drawn, self._layout.drawn, axis=1)
        shares = np.concatenate((top, drawn), axis=1, dtype=np.float32)
        return KeptTokens(*(torch.from_numpy(each) for each in (ids.astype(np.int32), shares, values)))


class WithTeacher(Samples):
    """Training samples with the teacher's tokens: ``teacher_`` and the names of :class:`KeptTokens`."""

    def __init__(self, samples: Samples, teacher: CachedTeacher) -> None:
        self.num_samples = len(samples)
        self._samples = samples
        self._teacher = teacher

    def _sample(self, index: int) -> Sample:
        kept = self._teacher.sample(index)._asdict()
        return self._samples[index] | {f"teacher_{name}": each for name, each in kept.items()}


def kept_of(samples: list[Sample]) -> KeptTokens | None:
    """The tokens of several samples, [B, T, K]; None where they come without."""
    if "teacher_ids" not in samples[0]:
        return None
    return KeptTokens(
        *(torch.stack([each[f"teacher_{name}"] for each in samples]) for name in KeptTokens._fields)
    )
