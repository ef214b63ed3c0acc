"""Tokens on disk: Megatron indexed datasets, ``<prefix>.bin`` and ``<prefix>.idx``, with a sidecar.

The two binary files are megatron-core's own format, byte for byte, so that Megatron-LM's datasets work here
(:mod:`~spikingbrain_train.data.token_file` reads them) and ours work there; its own writer takes five seconds
to import. The sidecar, ``<prefix>.json``, says which tokenizer made the tokens; datasets from elsewhere have
none.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from spikingbrain_train.data.dataset_files import ALL_SUFFIXES, SIDECAR_SUFFIX, SUFFIXES, existing_files
from spikingbrain_train.data.domains import DTYPE as DOMAIN_DTYPE
from spikingbrain_train.data.domains import DomainTable
from spikingbrain_train.data.loss_mask import LossMaskWriter
from spikingbrain_train.data.token_file import TokenFile, crc32_of, document_starts
from spikingbrain_train.data.token_ids import check_token_ids
from spikingbrain_train.data.tokenizers import Tokenizer, was_made_by
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.index_format import DOMAINS_SUFFIX, header_bytes, truncated

__all__ = [
    "DatasetInfo",
    "IndexedDatasetWriter",
    "TokenFile",
    "check_same_tokenizer",
    "document_starts",
    "existing_files",
    "open_indexed_dataset",
    "read_info",
    "token_dtype",
]

logger = logging.getLogger(__name__)

_UINT16_BELOW = 65500
"""Ids of a vocabulary that is stored in 16 bits, as megatron-core's DType.optimal_dtype has it."""


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
    domains: list[str] | None = None
    """Names of the domains that ``<prefix>.domains.npy`` counts; None where none are stored."""
    checksums: dict[str, list[int]] | None = None
    """Of each other file, by suffix: bytes and CRC-32. None in datasets of earlier releases."""


class IndexedDatasetWriter:
    """Writes one dataset into a staging folder and moves it into place when it is complete.

    Args:
        prefix: path of the finished dataset without suffix.
        tokenizer: the tokenizer that makes the tokens; its vocabulary decides between uint16 and int32.
        staging: existing folder on the same file system as ``prefix``; the caller removes it.
        domains: names of the domains of documents, which are stored then; None where they are not.
        with_loss_mask: the documents are examples, each of which comes with the tokens that carry loss.
        kept: bytes of tokens that lie in the staging folder already, and their checksum, from :meth:`sync` of
            a call that was killed. The same documents are given again; their tokens are not looked at.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        staging: Path,
        domains: DomainTable | None = None,
        *,
        with_loss_mask: bool = False,
        kept: tuple[int, int] = (0, 0),
    ) -> None:
        self.prefix = str(prefix)
        self._tokenizer = tokenizer
        self._staged = str(staging / Path(prefix).name)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._kept_bytes, self._crc = kept
        if self._kept_bytes:
            os.truncate(self._staged + ".bin", self._kept_bytes)
        self._tokens = open(self._staged + ".bin", "ab" if self._kept_bytes else "wb")  # noqa: SIM115
        self._lengths = array("i")
        self._table = domains
        self._domains = array("H")
        self._loss = LossMaskWriter(self._staged) if with_loss_mask else None
        self.tokens = 0
        self.text_bytes = 0

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def add_document(self, token_ids: np.ndarray, text_bytes: int, loss: np.ndarray | None = None) -> None:
        """Append one document: token ids [n] of :attr:`dtype`, end-of-sequence token included.

        Of an example, ``loss`` [n] bool says which of them carry loss.
        """
        self.add_documents(token_ids, np.array([len(token_ids)]), text_bytes, loss=loss)

    def add_documents(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        text_bytes: int,
        domains: np.ndarray | None = None,
        loss: np.ndarray | None = None,
    ) -> None:
        """Append several.

        Args:
            token_ids: theirs, one behind the other.
            lengths: how many each has [documents].
            text_bytes: UTF-8 bytes of all their texts.
            domains: numbers of their domains [documents] uint16; None in a dataset that stores none.
            loss: of examples, which of the tokens carry loss, bool like ``token_ids``.
        """
        assert (loss is None) == (self._loss is None)
        if self._loss is not None and loss is not None:
            self._loss.add(loss, lengths)
        if domains is not None:
            self._domains.frombytes(domains.astype(DOMAIN_DTYPE, copy=False).tobytes())
        if self.tokens * np.dtype(self.dtype).itemsize >= self._kept_bytes:
            written = np.ascontiguousarray(token_ids, dtype=self.dtype).data
            self._tokens.write(written)
            self._crc = isal_zlib.crc32(written, self._crc)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(token_ids)
        self.text_bytes += text_bytes

    def sync(self) -> tuple[str, tuple[int, int]]:
        """Have all tokens so far on the disk.

        Returns:
            Name of their file; its bytes and their checksum.
        """
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        return Path(self._tokens.name).name, (self._tokens.tell(), self._crc)

    def take_tokens(self) -> tuple[str, np.ndarray, str | None]:
        """Close the data file instead of :meth:`finish`, for a dataset that is only on its way.

        Returns:
            Path of that file; length of each document [documents] int32; of examples the path of a file with
            one uint8 a token, 1 where it carries loss.
        """
        self._tokens.close()
        loss_path = None if self._loss is None else self._loss.take_bytes()
        return self._tokens.name, np.frombuffer(self._lengths, dtype=np.int32), loss_path

    @property
    def document_domains(self) -> np.ndarray | None:
        """Numbers of the documents' domains [documents] uint16; None where none are stored."""
        return None if self._table is None else np.frombuffer(self._domains, dtype=DOMAIN_DTYPE)

    def finish(self) -> DatasetInfo:
        """Close the data file and write index and sidecar, still in the staging folder."""
        domains = self.document_domains
        self._tokens.close()
        self._write_index()
        if domains is not None:
            np.save(self._staged + DOMAINS_SUFFIX, domains, allow_pickle=False)
        if self._loss is not None:
            self._loss.finish()
        info = DatasetInfo(
            tokenizer=self._tokenizer.name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            dtype=np.dtype(self.dtype).name,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            domains=None if self._table is None else self._table.names,
            checksums=self._checksums(),
        )
        fields = {name: value for name, value in asdict(info).items() if value is not None}
        Path(self._staged + ".json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return info

    def _checksums(self) -> dict[str, list[int]]:
        """Of all files but the sidecar itself."""
        found = {}
        for suffix in ALL_SUFFIXES:
            path = self._staged + suffix
            if suffix != SIDECAR_SUFFIX and os.path.exists(path):
                crc = self._crc if suffix == ".bin" else crc32_of(path)
                found[suffix] = [os.path.getsize(path), crc or 0]
        return found

    def _write_index(self) -> None:
        """One sequence a document: its length int32, its first byte int64; then all boundaries int64."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        with open(self._staged + ".idx", "wb") as file:
            file.write(header_bytes(np.dtype(self.dtype).name, len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write(((ends - lengths) * np.dtype(self.dtype).itemsize).data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)

    def publish(self) -> None:
        """Move the finished files to their place, over older ones of that name."""
        for suffix in ALL_SUFFIXES:
            if suffix in SUFFIXES or os.path.exists(self._staged + suffix):
                os.replace(self._staged + suffix, self.prefix + suffix)
            else:
                with suppress(FileNotFoundError):  # of an older dataset
                    os.remove(self.prefix + suffix)

    def close(self) -> None:
        """Let go of the data file without finishing, after a failure."""
        try:
            self._tokens.close()
            if self._loss is not None:
                self._loss.close()
        except OSError:
            logger.debug("the unfinished %s.bin could not be flushed", self._staged)


def token_dtype(vocab_size: int) -> type[np.number]:
    """NumPy type in which token ids of that vocabulary are stored: uint16 below 65500 ids, else int32."""
    return np.uint16 if vocab_size < _UINT16_BELOW else np.int32


def read_info(prefix: str | Path) -> DatasetInfo | None:
    """The sidecar of ``prefix``, or None where there is none (a dataset that another tool made).

    Raises:
        DataError: the sidecar is malformed.
    """
    path = Path(f"{prefix}.json")
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        wanted = dict(_types_of_fields())
        if not isinstance(fields, dict) or any(
            not isinstance(fields.get(name), kind) for name, kind in wanted.items()
        ):
            raise ValueError("fields are missing")
        return DatasetInfo(**{name: fields[name] for name in wanted if name in fields})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not the description of an indexed dataset ({error}): run spikingbrain-preprocess "
            "again"
        ) from error


def _types_of_fields() -> Iterator[tuple[str, Any]]:
    types: dict[str, Any] = {"str": str, "int": int, "list[str] | None": (list, type(None))}
    types["dict[str, list[int]] | None"] = (dict, type(None))
    for name, field in DatasetInfo.__dataclass_fields__.items():
        yield name, types[str(field.type)]


def open_indexed_dataset(prefix: str | Path, vocab_size: int | None = None) -> TokenFile:
    """Open an indexed dataset after checking that its files are complete and belong together.

    In a distributed run every rank may call it and comes to the same conclusion without talking to the
    others.

    Args:
        prefix: path without .bin/.idx.
        vocab_size: the model's vocabulary, which all tokens must be of (read once, see
            :func:`~spikingbrain_train.data.token_ids.check_token_ids`); None skips that check.

    Raises:
        DataError: missing, truncated or mismatched files, a tokenizer with more ids than ``vocab_size``, or a
            token beyond it.
    """
    prefix = str(prefix)
    dataset = TokenFile(prefix)
    info = read_info(prefix)
    if info is None:
        logger.warning("%s has no %s.json: its tokenizer is unknown and goes unchecked", prefix, prefix)
    elif info.tokens != dataset.num_tokens:
        raise DataError(
            f"{prefix}.json speaks of {info.tokens} tokens but {prefix}.bin holds {dataset.num_tokens}: the "
            "files are of different runs, preprocess again with --overwrite"
        )
    elif info.dtype != dataset.dtype.name:
        raise DataError(
            f"{prefix}.json speaks of tokens stored as {info.dtype}, but {prefix}.idx has them as "
            f"{dataset.dtype.name}: the files are of different runs, preprocess again with --overwrite"
        )
    elif vocab_size is not None and info.vocab_size > vocab_size:
        raise DataError(
            f"the tokens of {prefix} were made by the tokenizer {info.tokenizer} with {info.vocab_size} ids "
            f"but the model's vocabulary has only {vocab_size}: preprocess with the tokenizer that belongs "
            "to the model"
        )
    if info is not None:
        check_sizes(prefix, info.checksums or {})
    if vocab_size is not None:
        check_token_ids(dataset, vocab_size)
    return dataset


def check_sizes(prefix: str, checksums: Mapping[str, Sequence[int]]) -> None:
    """Files beside tokens and index are as long as they were written; who needs one that is gone says so.

    Raises:
        DataError: one is shorter or longer.
    """
    for suffix, (size, _) in checksums.items():
        path = f"{prefix}{suffix}"
        if os.path.isfile(path) and (found := os.path.getsize(path)) != size:
            raise truncated(prefix, suffix, size, found)


def check_same_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse a dataset whose tokens were made by another tokenizer. Datasets without sidecar pass.

    Raises:
        DataError: the fingerprints differ.
    """
    info = read_info(prefix)
    if info is not None and not was_made_by(info.tokenizer_fingerprint, tokenizer):
        raise DataError(
            f"the tokens of {prefix} were made by the tokenizer {info.tokenizer} ({info.vocab_size} ids), "
            f"which is not the run's tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids): preprocess "
            "again with the latter"
        )
