"""Raw text to indexed tokens: the pipeline behind ``tools/preprocess_data.py``.

One process reads files and writes tokens, in order; worker processes decode, check and tokenize chunks of
documents. The output depends on the inputs and the tokenizer only, not on the number of workers. Nothing
appears under the output prefix before everything is complete.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spikingbrain_train.data.dataset_files import SUFFIXES, existing_files
from spikingbrain_train.data.documents import RawDocument, Source, find_sources
from spikingbrain_train.data.folders import LeftOut
from spikingbrain_train.data.tokenizers import Tokenizer, load_tokenizer
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.temporary_folder import temporary_folder

if TYPE_CHECKING:
    # Worker processes import this module and have no use for megatron-core, whose import takes seconds.
    from spikingbrain_train.data.indexed import DatasetInfo, IndexedDatasetWriter

_CHUNK_BYTES = 1 << 20
_CHUNK_DOCUMENTS = 1024
_SAMPLE_BYTES = 4 << 20
"""Text that a dry run tokenizes for its estimate."""
_WORKERS_PER_CORE = 4
_FEW_WORKERS = 8
"""As many workers may be asked for on every machine, on large ones so many for each core."""


@dataclass(frozen=True)
class PreprocessOptions:
    """What to tokenize and where to put it."""

    inputs: list[str]
    """Files, folders, globs, or ``pydoc-topics``."""
    output_prefix: str
    """Path of the dataset without .bin/.idx."""
    tokenizer: str
    """Hugging Face tokenizer folder or sentencepiece .model."""
    text_key: str = "text"
    """Field of a JSON line that holds the text."""
    valid_fraction: float = 0.0
    """Share of documents to hold out, in [0, 1). Above 0 the datasets are <prefix>_train and
    <prefix>_valid."""
    workers: int = 1
    """Tokenizing processes."""
    max_text_chars: int | None = None
    """Cut plain-text files at blank lines into documents of at most that many characters."""
    skip_bad_documents: bool = False
    """Count malformed or empty documents instead of stopping at the first."""
    overwrite: bool = False
    """Replace datasets that already lie at the output prefix."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ConfigurationError(
                f"--valid-fraction is {self.valid_fraction}: give a number from 0 up to below 1"
            )
        if self.workers < 1:
            raise ConfigurationError(f"--workers is {self.workers}: give at least 1")
        most = max(_FEW_WORKERS, _WORKERS_PER_CORE * _available_cores())
        if self.workers > most:
            raise ConfigurationError(
                f"--workers is {self.workers}: on {_available_cores()} cores give at most {most}"
            )
        if self.max_text_chars is not None and self.max_text_chars < 1:
            raise ConfigurationError(f"--max-text-chars is {self.max_text_chars}: give at least 1")
        if not Path(self.output_prefix).name or self.output_prefix.endswith("/"):
            raise ConfigurationError(
                f"--output-prefix {self.output_prefix!r} ends in no file name: append one"
            )

    @property
    def output_prefixes(self) -> list[str]:
        """The datasets that will exist at the end."""
        if self.valid_fraction > 0:
            return [f"{self.output_prefix}_train", f"{self.output_prefix}_valid"]
        return [self.output_prefix]


@dataclass(frozen=True)
class PreprocessPlan:
    """What a dry run found out."""

    sources: list[Source]
    tokenizer: Tokenizer
    outputs: list[str]
    dtype: str
    sampled_documents: int
    sampled_bytes: int
    """UTF-8 bytes of the sampled texts."""
    sampled_tokens: int
    whole: bool
    """Whether the sample is all there is."""
    left_out: list[str] = field(default_factory=list)
    """What lies among the inputs and is not read, a line for each kind."""

    def describe(self) -> str:
        """What a run would do, for people."""
        size = sum(source.size for source in self.sources)
        per_token = self.sampled_bytes / max(self.sampled_tokens, 1)
        return "\n".join(
            [
                f"inputs: {len(self.sources)}, {size / 1e6:,.1f} MB on disk, first {self.sources[0].name}",
                f"tokenizer: {self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids, eos "
                f"{self.tokenizer.eos_id}, stored as {self.dtype}",
                f"{'all' if self.whole else 'first'} {self.sampled_documents:,} documents: "
                f"{self.sampled_bytes / 1e6:,.1f} MB of text, {self.sampled_tokens:,} tokens, "
                f"{per_token:.2f} bytes per token",
                *self.left_out,
                f"would write: {', '.join(f'{prefix}.{{bin,idx,json}}' for prefix in self.outputs)}",
            ]
        )


@dataclass
class PreprocessReport:
    """What a run wrote."""

    datasets: dict[str, DatasetInfo] = field(default_factory=dict)
    """Sidecar of each output prefix."""
    skipped: list[str] = field(default_factory=list)
    """One sentence for each document left out, with file and line."""
    left_out: list[str] = field(default_factory=list)
    """What lies among the inputs and was not read, a line for each kind."""
    seconds: float = 0.0
    """Wall time, loading the tokenizer excluded."""

    def describe(self) -> str:
        """What was written, for people: one line a dataset and a total."""
        lines = [f"{'dataset':<40} {'documents':>12} {'tokens':>16} {'bytes/token':>12} {'dtype':>7}"]
        for prefix, info in self.datasets.items():
            lines.append(
                f"{prefix:<40} {info.documents:>12,} {info.tokens:>16,} "
                f"{info.text_bytes / info.tokens:>12.2f} {info.dtype:>7}"
            )
        tokens = sum(info.tokens for info in self.datasets.values())
        text_bytes = sum(info.text_bytes for info in self.datasets.values())
        seconds = max(self.seconds, 1e-9)
        lines.append(
            f"{seconds:,.1f} s: {tokens / seconds:,.0f} tokens/s, {text_bytes / seconds / 1e6:.2f} MB/s of "
            "text"
        )
        if self.skipped:
            lines.append(f"skipped {len(self.skipped):,} bad documents; the first: {self.skipped[0]}")
        return "\n".join(lines + self.left_out)


@dataclass(frozen=True)
class _TokenizedChunk:
    """A worker's result. Arrays cross the process border faster than lists."""

    token_ids: np.ndarray
    """Ids of all documents, end-of-sequence tokens included, in the dataset's dtype."""
    lengths: list[int]
    text_bytes: list[int]
    held_out: list[bool]
    skipped: list[str]


def plan_preprocessing(options: PreprocessOptions) -> PreprocessPlan:
    """Check inputs, tokenizer and outputs, and tokenize a sample; writes nothing.

    Raises:
        DataError, ConfigurationError: what :func:`preprocess` would say at its start.
    """
    left_out = LeftOut()
    sources, tokenizer = _prepare(options, left_out)
    from spikingbrain_train.data.indexed import token_dtype  # imports torch

    documents = text_bytes = tokens = 0
    whole = True
    for chunk in _chunks(sources, options):
        result = _tokenize(chunk, tokenizer, options, token_dtype(tokenizer.vocab_size))
        documents += len(result.lengths)
        text_bytes += sum(result.text_bytes)
        tokens += len(result.token_ids)
        if text_bytes >= _SAMPLE_BYTES:
            whole = chunk.position == sum(source.size for source in sources)
            break
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).name
    return PreprocessPlan(
        sources,
        tokenizer,
        options.output_prefixes,
        dtype,
        documents,
        text_bytes,
        tokens,
        whole,
        left_out.describe(),
    )


def preprocess(options: PreprocessOptions, progress: bool = False) -> PreprocessReport:
    """Tokenize all inputs into indexed datasets.

    Args:
        options: what to do.
        progress: say on standard error how far it is.

    Raises:
        DataError: bad input (with file and line), existing output, an unwritable or full output folder.
            Nothing is left behind, and what was there before is untouched.
        ConfigurationError: an option out of range.
    """
    left_out = LeftOut()
    with activity("opening the inputs", shown=progress):
        sources, tokenizer = _prepare(options, left_out)
    from spikingbrain_train.data.indexed import IndexedDatasetWriter  # imports torch

    report = PreprocessReport(left_out=left_out.describe())
    started = time.perf_counter()
    with _staging_folder(options.output_prefix) as staging:
        writers: list[IndexedDatasetWriter] = []
        try:
            writers += [
                IndexedDatasetWriter(prefix, tokenizer, staging) for prefix in options.output_prefixes
            ]
            _write_all(sources, tokenizer, options, writers, report, progress)
            infos = [writer.finish() for writer in writers]
            _refuse_empty(options, infos, report)
            for writer in writers:
                writer.publish()
        except OSError as error:  # errors of reading are DataErrors already
            raise _unwritable(options.output_prefix, error) from error
        finally:
            for writer in writers:
                writer.close()
    report.datasets = dict(zip(options.output_prefixes, infos, strict=True))
    report.seconds = time.perf_counter() - started
    return report


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_held_out(text: str, valid_fraction: float) -> bool:
    """Whether a document belongs to the held-out part, decided by its content alone.

    So copies of a document stay together, and the split survives reordering, other workers and added files.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < valid_fraction * 2.0**64


def _prepare(options: PreprocessOptions, left_out: LeftOut) -> tuple[list[Source], Tokenizer]:
    """Everything that can be refused before work starts."""
    sources = find_sources(options.inputs, left_out)
    written = {
        os.path.realpath(f"{prefix}{suffix}") for prefix in options.output_prefixes for suffix in SUFFIXES
    }
    for source in sources:
        if os.path.realpath(source.name) in written:
            raise DataError(
                f"{source.name} is an input and would be written over: choose another --output-prefix"
            )
    if not options.overwrite:
        existing = [path for prefix in options.output_prefixes for path in existing_files(prefix)]
        if existing:
            raise DataError(
                f"{existing[0]} exists already: choose another --output-prefix or add --overwrite"
            )
    return sources, load_tokenizer(options.tokenizer)


def _write_all(
    sources: list[Source],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    writers: list[IndexedDatasetWriter],
    report: PreprocessReport,
    progress: bool,
) -> None:
    read = 0
    with activity("tokenizing", sum(source.size for source in sources), "B", shown=progress) as done:
        for chunk, result in _tokenize_all(_chunks(sources, options), tokenizer, options, writers[0].dtype):
            end = 0
            for length, size, held_out in zip(
                result.lengths, result.text_bytes, result.held_out, strict=True
            ):
                end += length
                writers[held_out].add_document(result.token_ids[end - length : end], size)
            report.skipped += result.skipped
            done.advance(chunk.position - read)
            read = chunk.position


@dataclass(frozen=True)
class _Chunk:
    """Documents that one worker handles at a time."""

    documents: list[RawDocument]
    position: int
    """Bytes of all sources read up to its end."""


def _chunks(sources: Iterable[Source], options: PreprocessOptions) -> Iterator[_Chunk]:
    """Group documents so that a chunk is worth a trip to another process."""
    documents: list[RawDocument] = []
    size = before = position = 0
    for source in sources:
        for document in source.read(options.max_text_chars):
            documents.append(document)
            size += len(document.payload)
            position = before + document.position
            if size >= _CHUNK_BYTES or len(documents) >= _CHUNK_DOCUMENTS:
                yield _Chunk(documents, position)
                documents, size = [], 0
        before += source.size
    if documents:
        yield _Chunk(documents, position)


def _tokenize_all(
    chunks: Iterator[_Chunk], tokenizer: Tokenizer, options: PreprocessOptions, dtype: type[np.number]
) -> Iterator[tuple[_Chunk, _TokenizedChunk]]:
    """Tokenize chunks in worker processes and return them in their order, with a bounded number under way."""
    if options.workers == 1:
        for chunk in chunks:
            yield chunk, _tokenize(chunk, tokenizer, options, dtype)
        return
    executor = ProcessPoolExecutor(
        options.workers,
        # Not fork: the tokenizer library and PyTorch have threads, whose locks a forked child would inherit.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, options, dtype),
    )
    under_way: deque[tuple[_Chunk, Future[_TokenizedChunk]]] = deque()
    try:
        # ProcessPoolExecutor.map would read all chunks into memory first.
        under_way.extend((c, executor.submit(_work, c)) for c in islice(chunks, 2 * options.workers))
        while under_way:
            chunk, future = under_way.popleft()
            result = future.result()
            under_way.extend((c, executor.submit(_work, c)) for c in islice(chunks, 1))
            yield chunk, result
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process was killed, probably for want of memory: use fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker_state: tuple[Tokenizer, PreprocessOptions, type[np.number]]
"""Set once in each worker process, so that the tokenizer does not travel with every chunk."""


def _start_worker(tokenizer: Tokenizer, options: PreprocessOptions, dtype: type[np.number]) -> None:
    global _worker_state
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent shuts workers down
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _worker_state = (tokenizer, options, dtype)


def _work(chunk: _Chunk) -> _TokenizedChunk:
    tokenizer, options, dtype = _worker_state
    return _tokenize(chunk, tokenizer, options, dtype)


def _tokenize(
    chunk: _Chunk, tokenizer: Tokenizer, options: PreprocessOptions, dtype: type[np.number]
) -> _TokenizedChunk:
    texts: list[str] = []
    skipped: list[str] = []
    for document in chunk.documents:
        try:
            texts.append(document.text(options.text_key))
        except DataError as error:
            if not options.skip_bad_documents:
                raise
            skipped.append(str(error))
    encoded = tokenizer.encode_batch(texts)
    lengths = [len(ids) + 1 for ids in encoded]
    token_ids = np.empty(sum(lengths), dtype=dtype)
    end = 0
    for ids, length in zip(encoded, lengths, strict=True):
        end += length
        token_ids[end - length : end - 1] = ids
        token_ids[end - 1] = tokenizer.eos_id
    return _TokenizedChunk(
        token_ids=token_ids,
        lengths=lengths,
        text_bytes=[len(text.encode("utf-8")) for text in texts],
        held_out=[is_held_out(text, options.valid_fraction) for text in texts],
        skipped=skipped,
    )


def _refuse_empty(options: PreprocessOptions, infos: list[DatasetInfo], report: PreprocessReport) -> None:
    total = sum(info.documents for info in infos)
    if total == 0:
        raise DataError(
            f"none of the {len(report.skipped)} documents is usable; the first: {report.skipped[0]}"
        )
    for prefix, info in zip(options.output_prefixes, infos, strict=True):
        if info.documents == 0:
            raise DataError(
                f"all {total} documents fell on one side of --valid-fraction {options.valid_fraction} and "
                f"{prefix} would be empty: give more documents, another fraction, or cut long text files "
                "with --max-text-chars"
            )


@contextmanager
def _staging_folder(output_prefix: str) -> Iterator[Path]:
    """A temporary folder beside the output, removed in the end whatever happens."""
    prefix = Path(output_prefix)
    with ExitStack() as stack:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(temporary_folder(prefix.with_name(f".{prefix.name}")))
        except OSError as error:
            raise _unwritable(output_prefix, error) from error
        yield staging


def _unwritable(output_prefix: str, error: OSError) -> DataError:
    return DataError(
        f"cannot write {output_prefix}: {error.strerror or error}: free space there or choose another "
        "--output-prefix"
    )
