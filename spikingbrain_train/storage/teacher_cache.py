"""A folder of a teacher's likeliest tokens: which files it has, and what lies in them. Torch is not needed.

    <folder>/teacher_cache.json                        what it is of, and its layout: see :class:`CacheLayout`
    <folder>/samples_000000000_000000128.safetensors   the samples from the first number up to the second

A file of samples appears under its name when it is complete, so what is there can be used.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.durable_files import write_text_durably

CACHE_FILE = "teacher_cache.json"
IDS, LOG_PROBABILITIES, TAIL = "ids", "log_probabilities", "tail"
"""Tensors of a file: ids and log_probabilities [samples, tokens, kept], tail [samples, tokens]."""
CHECKSUMS = "crc32"
"""In a file's metadata, of each sample: 8 hexadecimal digits over its rows of the three tensors, in this
order. Files of earlier releases are without."""

_VERSION = 1
_SHARD = re.compile(r"samples_(\d{9})_(\d{9})\.safetensors")
_SHARD_BYTES, _FEWEST_SHARDS = 1 << 26, 64
_UINT16_UP_TO = 1 << 16
_LARGEST_HEADER = 1 << 20
_ITEM_BYTES = {"U16": 2, "I32": 4, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class CacheLayout:
    """What is kept of each token's distribution, and how samples are put into files."""

    top: int
    """Likeliest tokens of each distribution."""
    drawn: int
    """Tokens drawn among the others, each of which stands for the same part of their probability."""
    seq_length: int
    """Tokens of a sample."""
    shard_samples: int
    """Samples of a file; the last one may have fewer."""
    vocab_size: int

    @classmethod
    def of(cls, top: int, drawn: int, seq_length: int, vocab_size: int, samples: int) -> CacheLayout:
        """With files of at most some 64 MiB, and some 64 of them where samples are few.

        A writer that is killed loses the files it was at, and data-parallel ranks share them out.
        """
        one = cls(top, drawn, seq_length, 1, vocab_size)
        fitting = min(_SHARD_BYTES // one.sample_bytes, samples // _FEWEST_SHARDS)
        return cls(top, drawn, seq_length, max(1, fitting), vocab_size)

    @property
    def kept(self) -> int:
        return self.top + self.drawn

    @property
    def ids_dtype(self) -> str:
        """By safetensors' name: 16 bits where the vocabulary fits."""
        return "U16" if self.vocab_size <= _UINT16_UP_TO else "I32"

    @property
    def token_bytes(self) -> int:
        return self.kept * (_ITEM_BYTES[self.ids_dtype] + _ITEM_BYTES["F16"]) + _ITEM_BYTES["F32"]

    @property
    def sample_bytes(self) -> int:
        return self.seq_length * self.token_bytes

    def tensors(self, samples: int) -> dict[str, tuple[str, list[int]]]:
        """Name -> (safetensors' dtype, shape) of the tensors of a file of ``samples``."""
        tokens = [samples, self.seq_length]
        return {
            IDS: (self.ids_dtype, [*tokens, self.kept]),
            LOG_PROBABILITIES: ("F16", [*tokens, self.kept]),
            TAIL: ("F32", tokens),
        }

    def shards(self, samples: int) -> list[range]:
        """The samples of each file, where there are ``samples`` in all."""
        size = self.shard_samples
        return [range(first, min(first + size, samples)) for first in range(0, samples, size)]


def shard_path(folder: Path, samples: range) -> Path:
    """The file of ``samples``."""
    return folder / f"samples_{samples.start:09}_{samples.stop:09}.safetensors"


def shards_of(folder: Path) -> dict[int, range]:
    """The files that are there: first sample -> samples; of two that begin alike the longer one."""
    found: dict[int, range] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _SHARD.fullmatch(path.name)
        if match is not None:
            samples = range(int(match[1]), int(match[2]))
            found[samples.start] = max(samples, found.get(samples.start, samples), key=len)
    return found


def remove_leftovers(folder: Path) -> None:
    """Take away what writers that were killed have left; nobody may be writing."""
    for path in folder.glob(".samples_*.safetensors.*"):
        path.unlink(missing_ok=True)


def check_shard(path: Path, layout: CacheLayout, samples: range) -> None:
    """Hold a file's head and size to what its name and the layout say. Raises DataError, naming it."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Any = json.loads(file.read(min(length, _LARGEST_HEADER)))
        found = {name: (e["dtype"], e["shape"]) for name, e in header.items() if name != "__metadata__"}
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
        whole = path.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error):
        found, whole = {}, False
    if not whole or found != layout.tensors(len(samples)):
        raise DataError(
            f"{path} is damaged, or not of this cache; remove it and let spikingbrain-cache-teacher write it"
        )


def write_cache_file(folder: Path, identity: Mapping[str, Any], layout: CacheLayout) -> None:
    """Say what the folder is of."""
    content = {"version": _VERSION, "layout": asdict(layout), "identity": dict(identity)}
    write_text_durably(folder / CACHE_FILE, json.dumps(content, indent=2) + "\n")


def read_cache_file(folder: Path, named: str) -> tuple[dict[str, Any], CacheLayout]:
    """What a cache is of, and its layout.

    Args:
        folder: of the cache.
        named: ``stage.distillation.cache=<folder>``, for the sentence.

    Raises:
        DataError: it is none, or damaged, or of a later version of this project.
    """
    path = folder / CACHE_FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        version, identity = content["version"], dict(content["identity"])
        layout = CacheLayout(**{name: int(value) for name, value in content["layout"].items()})
    except FileNotFoundError:
        raise DataError(
            f"{named} has no {CACHE_FILE}, so it is no cache of a teacher; write one with "
            f"spikingbrain-cache-teacher --output {folder}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} is damaged; write the cache anew with spikingbrain-cache-teacher") from None
    if version != _VERSION:
        raise DataError(
            f"{path} has version {version}, which this version of the project does not know; update it"
        )
    return identity, layout
