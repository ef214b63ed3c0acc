"""Tokens on disk: Megatron indexed datasets (``<prefix>.bin`` and ``<prefix>.idx``) with a sidecar
``<prefix>.json``.

The two binary files are megatron-core's own format, written and read by its classes, so that Megatron-LM's
datasets work here and ours work there. The sidecar says which tokenizer made the tokens; datasets from
elsewhere have none.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain_train.config.errors import DataError
from spikingbrain_train.data.tokenizers import Tokenizer

with warnings.catch_warnings():
    # megatron-core announces several times on import that Transformer Engine and Apex are absent: of no
    # concern here.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<9sQBQQ")
"""Start of an .idx file: magic, version, dtype code, number of sequences, number of document boundaries."""
_MAGIC = b"MMIDIDX\x00\x00"

SUFFIXES = (".bin", ".idx", ".json")
"""The files of one dataset, in the order in which they are put in place."""


@dataclass(frozen=True)
class DatasetInfo:
    """The sidecar of an indexed dataset."""

    tokenizer: str
    """Name of the tokenizer's folder or file."""
    tokenizer_fingerprint: str
    """:attr:`Tokenizer.fingerprint` of the tokenizer that made the tokens."""
    vocab_size: int
    """Its largest id + 1."""
    eos_id: int
    """Id of the token that ends every document."""
    dtype: str
    """NumPy type of a stored token."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens, end-of-sequence tokens included."""
    text_bytes: int
    """UTF-8 bytes of the texts."""


class IndexedDatasetWriter:
    """Writes one dataset into a staging folder and moves it into place when it is complete.

    Args:
        prefix: path of the finished dataset without suffix.
        tokenizer: the tokenizer that makes the tokens; its vocabulary decides between uint16 and int32.
        staging: existing folder on the same file system as ``prefix``; the caller removes it.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer, staging: Path) -> None:
        self.prefix = str(prefix)
        self._tokenizer = tokenizer
        self._staged = str(staging / Path(prefix).name)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._builder = IndexedDatasetBuilder(self._staged + ".bin", dtype=self.dtype)
        self.documents = 0
        self.tokens = 0
        self.text_bytes = 0

    def add_document(self, token_ids: np.ndarray, text_bytes: int) -> None:
        """Append one document: token ids [n] of :attr:`dtype`, end-of-sequence token included."""
        self._builder.add_document(token_ids, [len(token_ids)])
        self.documents += 1
        self.tokens += len(token_ids)
        self.text_bytes += text_bytes

    def finish(self) -> DatasetInfo:
        """Close the data file and write index and sidecar, still in the staging folder."""
        info = DatasetInfo(
            tokenizer=self._tokenizer.name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            dtype=np.dtype(self.dtype).name,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
        )
        self._builder.finalize(self._staged + ".idx")
        Path(self._staged + ".json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
        return info

    def publish(self) -> None:
        """Move the finished files to their place, over older ones of that name."""
        for suffix in SUFFIXES:
            os.replace(self._staged + suffix, self.prefix + suffix)

    def close(self) -> None:
        """Let go of the data file without finishing, after a failure."""
        try:
            self._builder.data_file.close()
        except OSError:
            logger.debug("the unfinished %s.bin could not be flushed", self._staged)


def token_dtype(vocab_size: int) -> type[np.number]:
    """NumPy type in which token ids of that vocabulary are stored: uint16 below 65500 ids, else int32."""
    return DType.optimal_dtype(vocab_size)


def existing_files(prefix: str | Path) -> list[str]:
    """Files of a dataset that already lie at ``prefix``."""
    return [f"{prefix}{suffix}" for suffix in SUFFIXES if os.path.exists(f"{prefix}{suffix}")]


def read_info(prefix: str | Path) -> DatasetInfo | None:
    """The sidecar of ``prefix``, or None where there is none (a dataset that another tool made).

    Raises:
        DataError: the sidecar is malformed.
    """
    path = Path(f"{prefix}.json")
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        types = {"str": str, "int": int}
        wanted = {name: types[str(field.type)] for name, field in DatasetInfo.__dataclass_fields__.items()}
        if not isinstance(fields, dict) or any(
            not isinstance(fields.get(name), kind) for name, kind in wanted.items()
        ):
            raise ValueError("fields are missing")
        return DatasetInfo(**{name: fields[name] for name in wanted})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not the description of an indexed dataset ({error}): run tools/preprocess_data.py "
            "again"
        ) from error


def open_indexed_dataset(prefix: str | Path, vocab_size: int | None = None) -> IndexedDataset:
    """Open an indexed dataset after checking that its files are complete and belong together.

    Only reads files: in a distributed run every rank may call it and comes to the same conclusion without
    talking to the others.

    Args:
        prefix: path without .bin/.idx.
        vocab_size: the model's vocabulary; None skips that check.

    Returns:
        megatron-core's IndexedDataset, memory-mapped. Its sequences lie in the .bin file one behind the
        other.

    Raises:
        DataError: missing, truncated or mismatched files, or a tokenizer with more ids than ``vocab_size``.
    """
    prefix = str(prefix)
    _check_files(prefix)
    info = read_info(prefix)
    dataset = IndexedDataset(prefix)
    if info is None:
        logger.warning("%s has no %s.json: its tokenizer is unknown and goes unchecked", prefix, prefix)
        return dataset
    if info.tokens != num_tokens(dataset):
        raise DataError(
            f"{prefix}.json speaks of {info.tokens} tokens but {prefix}.bin holds {num_tokens(dataset)}: the "
            "files are of different runs, preprocess again with --overwrite"
        )
    if vocab_size is not None and info.vocab_size > vocab_size:
        raise DataError(
            f"the tokens of {prefix} were made by the tokenizer {info.tokenizer} with {info.vocab_size} ids "
            f"but the model's vocabulary has only {vocab_size}: preprocess with the tokenizer that belongs "
            "to the model"
        )
    return dataset


def check_same_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse a dataset whose tokens were made by another tokenizer. Datasets without sidecar pass.

    Raises:
        DataError: the fingerprints differ.
    """
    info = read_info(prefix)
    if info is not None and info.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"the tokens of {prefix} were made by the tokenizer {info.tokenizer} ({info.vocab_size} ids), "
            f"which is not the run's tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids): preprocess "
            "again with the latter"
        )


def num_tokens(dataset: IndexedDataset) -> int:
    """Number of tokens in an indexed dataset."""
    return int(dataset.sequence_lengths.sum(dtype=np.int64))


def read_tokens(dataset: IndexedDataset, start: int, count: int) -> np.ndarray:
    """Tokens [count] int64 from position ``start`` of the concatenated documents."""
    itemsize = np.dtype(dataset.index.dtype).itemsize
    # A copy, because the memory map is read-only and PyTorch wants writable memory.
    return dataset.bin_reader.read(dataset.index.dtype, count, start * itemsize).astype(np.int64)


def document_starts(dataset: IndexedDataset) -> np.ndarray:
    """Positions [documents + 1] int64 of each document's first token in the concatenated documents, ascending
    and without empty documents; the last entry is the number of tokens."""
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    return np.unique(np.concatenate(([0], ends))[dataset.document_indices])


def _check_files(prefix: str) -> None:
    """Compare header and file sizes. megatron-core only asserts part of this, and maps short files as they
    are."""
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise DataError(
                f"there is no indexed dataset at {prefix} ({prefix}{suffix} is missing): give the path "
                "without .bin/.idx, and make it with tools/preprocess_data.py"
            )
    try:
        with open(prefix + ".idx", "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise _truncated(prefix, ".idx", _HEADER.size, len(header))
            magic, version, code, sequences, boundaries = _HEADER.unpack(header)
            if magic != _MAGIC or version != 1 or code not in {int(member.value) for member in DType}:
                raise DataError(f"{prefix}.idx is not the index of a Megatron dataset: check the prefix")
            index_size = _HEADER.size + sequences * (4 + 8) + boundaries * 8
            found = os.path.getsize(prefix + ".idx")
            # A multimodal index has one more byte a sequence.
            if found not in (index_size, index_size + sequences):
                raise _truncated(prefix, ".idx", index_size, found)
            lengths = np.fromfile(file, dtype=np.int32, count=sequences)
            pointers = np.fromfile(file, dtype=np.int64, count=sequences)
            ends = np.fromfile(file, dtype=np.int64, count=boundaries)
        itemsize = DType.size(int(code))
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        if (
            (lengths < 0).any()
            or boundaries == 0
            or ends[-1] != sequences
            or (pointers != starts * itemsize).any()
        ):
            raise DataError(f"{prefix}.idx contradicts itself: preprocess again with --overwrite")
        data_size = int(lengths.sum(dtype=np.int64)) * itemsize
        found = os.path.getsize(prefix + ".bin")
        if found != data_size:
            raise _truncated(prefix, ".bin", data_size, found)
        if data_size == 0:
            raise DataError(f"{prefix} holds no tokens: preprocess inputs that have documents")
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error


def _truncated(prefix: str, suffix: str, expected: int, found: int) -> DataError:
    return DataError(
        f"{prefix}{suffix} is {found} bytes long instead of {expected}: it is truncated or of another run, "
        "preprocess again with --overwrite"
    )
