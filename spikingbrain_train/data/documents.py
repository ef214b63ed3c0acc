"""Where documents come from: text, JSON lines (plain, .gz, .zst), Parquet, folders, globs, Python's manual.

Reading is split in two so that worker processes can share the work: :meth:`Source.read` cuts a file into raw
documents (cheap, in order), :meth:`RawDocument.text` decodes and checks one (the worker's part).
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from spikingbrain_train.data.folders import (
    OTHER_TYPE,
    SIDECAR,
    LeftOut,
    files_below,
    is_sidecar,
    special_kind,
)
from spikingbrain_train.data.parquet import PARQUET_SUFFIX, parquet_documents
from spikingbrain_train.data.raw_document import RawDocument
from spikingbrain_train.errors import DataError

PYDOC_TOPICS = "pydoc-topics"
"""Input name of the documentation topics that every Python carries (``pydoc_data.topics``, PSF licence)."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""One JSON object a line."""
TEXT_SUFFIXES = (".txt", ".md", ".rst")
"""One document a file."""
COMPRESSION_SUFFIXES = (".gz", ".zst")
"""What may follow either."""

_BLOCK_BYTES = 1 << 20
_ZSTD_MAX_WINDOW = 1 << 31
"""Archives made with `zstd --long=31` need windows above the library's default limit of 128 MiB."""


@dataclass(frozen=True)
class Source:
    """One file of documents, or Python's documentation topics."""

    name: str
    """Path as given, or ``pydoc-topics``."""
    size: int
    """Bytes on disk."""

    def read(
        self, max_text_chars: int | None = None, fields: Sequence[str] = ("text",)
    ) -> Iterator[RawDocument]:
        """All documents in order.

        Args:
            max_text_chars: cut plain-text files at blank lines into documents of at most that many
                characters; None keeps a file as one document. JSON documents are never cut.
            fields: what is read of Parquet files, the text or conversation first.

        Raises:
            DataError: the file is empty, unreadable, damaged or cut short.
        """
        count = 0
        for document in self._read(max_text_chars, fields):
            count += 1
            yield document
        if count == 0:
            raise DataError(f"{self.name} is empty: remove it from the inputs or give a file with documents")

    def _read(self, max_text_chars: int | None, fields: Sequence[str]) -> Iterator[RawDocument]:
        if self.name == PYDOC_TOPICS:
            yield from _pydoc_topics()
            return
        kind, compression = _require_format(self.name)
        if kind == "parquet":
            yield from parquet_documents(self.name, self.size, fields)
            return
        try:
            with open(self.name, "rb") as file:
                blocks = _decompressed_blocks(file, compression)
                if kind == "json":
                    for number, line in enumerate(_lines(blocks), start=1):
                        if number == 1:
                            line = line.removeprefix(b"\xef\xbb\xbf")  # byte-order mark
                        yield RawDocument(f"{self.name}:{number}", line, True, file.tell(), file=self.name)
                else:
                    content = b"".join(blocks).removeprefix(b"\xef\xbb\xbf")
                    if content.strip():
                        yield from _text_documents(self.name, content, file.tell(), max_text_chars)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(
                f"{self.name} is damaged or cut short ({str(error).rstrip('.')}): compress or copy it again"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror or error}") from error


def find_sources(inputs: Iterable[str], left_out: LeftOut | None = None) -> list[Source]:
    """Expand files, folders (searched recursively), globs and ``pydoc-topics`` into sources.

    The order is that of the inputs, alphabetical inside a folder or glob; a file that is found twice counts
    once. Links are followed. Not read are hidden folders, and the sidecars of tokenized datasets, which a run
    into an input folder leaves there.

    Args:
        inputs: as a user gives them.
        left_out: notes here what folders and globs hold besides.

    Raises:
        DataError: an input that matches nothing, or a file of an unsupported type.
    """
    left_out = left_out if left_out is not None else LeftOut()
    sources: dict[str, Source] = {}
    for given in inputs:
        if given == PYDOC_TOPICS:
            sources.setdefault(PYDOC_TOPICS, Source(PYDOC_TOPICS, _pydoc_size()))
            continue
        for path in _expand(given, left_out):
            sources.setdefault(str(path.resolve()), Source(str(path), path.stat().st_size))
    if not sources:
        raise DataError("no inputs: name text or JSON-lines files, folders or globs with --input")
    return list(sources.values())


def _expand(given: str, left_out: LeftOut) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found = sorted(_documents_in(path, left_out))
        if not found:
            besides = "".join(f"; {line}" for line in left_out.describe())
            raise DataError(f"the folder {given} holds no {_supported()} files{besides}")
        return found
    if path.is_file():
        _require_format(given)
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(given, recursive=True))]
    found = []
    for match in matches:
        if match.is_dir():
            found += sorted(_documents_in(match, left_out))
        elif not match.is_file():
            left_out.add(special_kind(match), match)
        elif is_sidecar(match):
            left_out.add(SIDECAR, match)
        else:
            _require_format(str(match))
            found.append(match)
    if not found:
        raise DataError(f"there is no file, folder or glob match {given}: check --input")
    return found


def _documents_in(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    for path in files_below(folder, left_out):
        if _format_of(path.name) is None:
            left_out.add(OTHER_TYPE, path)
        elif is_sidecar(path):
            left_out.add(SIDECAR, path)
        else:
            yield path


def _format_of(name: str) -> tuple[str, str] | None:
    """("json", "text" or "parquet", compression suffix) from the file name; None for an unsupported type."""
    stem = name.lower()
    if stem.endswith(PARQUET_SUFFIX):
        return "parquet", ""
    compression = next((suffix for suffix in COMPRESSION_SUFFIXES if stem.endswith(suffix)), "")
    stem = stem.removesuffix(compression)
    if stem.endswith(JSON_SUFFIXES):
        return "json", compression
    return ("text", compression) if stem.endswith(TEXT_SUFFIXES) else None


def _require_format(name: str) -> tuple[str, str]:
    found = _format_of(name)
    if found is None:
        raise DataError(f"{name} is of an unsupported type: give {_supported()} files")
    return found


def _supported() -> str:
    return f"{', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)} (each also with .gz or .zst), {PARQUET_SUFFIX}"


def _decompressed_blocks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """Blocks of decompressed bytes; raises when a compressed stream ends early."""
    if compression == ".zst":
        yield from _zstandard_blocks(file)
        return
    stream: io.BufferedIOBase | BinaryIO = gzip.GzipFile(fileobj=file) if compression == ".gz" else file
    while block := stream.read(_BLOCK_BYTES):
        yield block


def _zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Like zstandard's stream_reader, which however ends in silence when the last frame is cut short."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    frame = None
    while block := file.read(_BLOCK_BYTES // 4):
        while block:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(block)
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last zstandard frame is incomplete")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their end; a line feed at the very end of the file starts no further line."""
    pending: list[bytes] = []
    for block in blocks:
        first, *rest = block.split(b"\n")
        pending.append(first)
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    if last := b"".join(pending):
        yield last


def _text_documents(name: str, content: bytes, position: int, max_chars: int | None) -> Iterator[RawDocument]:
    if max_chars is None:
        yield RawDocument(name, content, False, position, file=name)
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not valid UTF-8 (byte {error.start}): convert the file to UTF-8") from error
    for number, piece in enumerate(cut_text(text, max_chars), start=1):
        payload = piece.encode("utf-8")
        yield RawDocument(f"{name}#{number}", payload, False, position, piece=number, file=name)


def cut_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at most ``max_chars`` characters.

    Cuts are preferably behind a blank line, else behind a line, else behind a space. Pieces that are only
    white space are dropped.
    """
    start = 0
    while start < len(text):
        end = min(start + max_chars, len(text))
        if end < len(text):
            for separator in ("\n\n", "\n", " "):
                at = text.rfind(separator, start, end)
                if at > start:
                    end = at + len(separator)
                    break
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end


def _pydoc_topics() -> Iterator[RawDocument]:
    from pydoc_data.topics import topics

    position = 0
    for key in sorted(topics):
        payload = topics[key].encode("utf-8")
        position += len(payload)
        yield RawDocument(f"{PYDOC_TOPICS}:{key}", payload, False, position, file=PYDOC_TOPICS)


def _pydoc_size() -> int:
    from pydoc_data.topics import topics

    return sum(len(text.encode("utf-8")) for text in topics.values())
