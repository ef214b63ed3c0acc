"""Documents to token ids, in chunks that worker processes take.

The ids depend on the documents and the tokenizer only, not on the number of workers, and come in the order of
the documents. Worker processes import this module, so it needs neither torch nor megatron-core, whose import
takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np

from spikingbrain_train.data.chat import chat_template
from spikingbrain_train.data.chat_loss import chat_examples
from spikingbrain_train.data.documents import Source
from spikingbrain_train.data.domains import domain_of
from spikingbrain_train.data.encoders import Encoder
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.raw_document import EmptyDocumentError, RawDocument
from spikingbrain_train.data.split import place_of
from spikingbrain_train.data.tokenizers import Tokenizer
from spikingbrain_train.errors import DataError

_CHUNK_BYTES = 1 << 20
_CHUNK_DOCUMENTS = 1024
_SAMPLED_SOURCES, _SAMPLE_CHARACTERS = 8, 1 << 17
_MOST_NAMED = 4
"""Bad documents whose sentences stand in one error."""

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Chunk:
    """Documents that one worker handles at a time."""

    documents: list[RawDocument]
    position: int
    """Bytes of all sources read up to its end."""


@dataclass(frozen=True)
class TokenizedChunk:
    """A worker's result. Arrays cross the process border faster than lists."""

    token_ids: np.ndarray
    """Ids of all documents, end-of-sequence tokens included, in the dataset's dtype."""
    lengths: list[int]
    text_bytes: list[int]
    places: list[int]
    """Of the documents, as :func:`~spikingbrain_train.data.split.place_of`; zeros where none are held out."""
    domains: list[str]
    """Of the documents; empty where they are not asked for."""
    skipped: list[str]
    """One sentence for each document left out."""
    empty: int
    """How many of those hold no text."""
    loss: np.ndarray | None = None
    """Of examples, [tokens] bool: which of the ids carry loss."""
    set_apart: int = 0
    """Examples of single answers, beside those of whole conversations."""


def split_into_chunks(sources: Iterable[Source], options: PreprocessOptions) -> Iterator[Chunk]:
    """Group documents so that a chunk is worth a trip to another process."""
    documents: list[RawDocument] = []
    size = before = position = 0
    for source in sources:
        for document in source.read(options.max_text_chars, options.fields):
            documents.append(document)
            size += len(document.payload)
            position = before + document.position
            if size >= _CHUNK_BYTES or len(documents) >= _CHUNK_DOCUMENTS:
                yield Chunk(documents, position)
                documents, size = [], 0
        before += source.size
    if documents:
        yield Chunk(documents, position)


def tokenize_all(
    chunks: Iterator[Chunk],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    dtype: type[np.number],
    encoder: Encoder,
    workers: int,
) -> Iterator[tuple[Chunk, TokenizedChunk]]:
    """Tokenize chunks in worker processes and return them in their order, with a bounded number under way.

    Raises:
        DataError: as :func:`tokenize` does, or a worker was killed.
    """
    if workers == 1:
        for chunk in chunks:
            yield chunk, tokenize(chunk, tokenizer, options, dtype, encoder)
        return
    executor = ProcessPoolExecutor(
        workers,
        # Not fork: the tokenizer library and PyTorch have threads, whose locks a forked child would inherit.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, options, dtype, encoder),
    )
    under_way: deque[tuple[Chunk, Future[TokenizedChunk]]] = deque()
    try:
        # ProcessPoolExecutor.map would read all chunks into memory first.
        under_way.extend((c, executor.submit(_work, c)) for c in islice(chunks, 2 * workers))
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


_worker_state: tuple[Tokenizer, PreprocessOptions, type[np.number], Encoder]
"""Set once in each worker process, so that the tokenizer does not travel with every chunk."""


def _start_worker(
    tokenizer: Tokenizer, options: PreprocessOptions, dtype: type[np.number], encoder: Encoder
) -> None:
    global _worker_state
    threading.Thread(target=_end_with_parent, name="end of the worker", daemon=True).start()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent shuts workers down
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _worker_state = (tokenizer, options, dtype, encoder)


def _end_with_parent() -> None:
    """A parent that is killed says nothing to its workers, which would wait for chunks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> TokenizedChunk:
    return tokenize(chunk, *_worker_state)


def tokenize(
    chunk: Chunk,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    dtype: type[np.number],
    encoder: Encoder,
) -> TokenizedChunk:
    """Decode, check and tokenize a chunk, in this process.

    Raises:
        DataError: a document is malformed or empty, unless ``options`` skip such.
    """
    if options.learns_answers:
        return _tokenize_examples(chunk, options, dtype)
    texts, domains, bad = _texts(chunk, options)
    ids, lengths = encoder.encode(texts)
    return TokenizedChunk(
        token_ids=np.insert(ids.astype(dtype), np.cumsum(lengths), tokenizer.eos_id),
        lengths=(lengths + 1).tolist(),
        text_bytes=[len(text.encode("utf-8")) for text in texts],
        places=[place_of(text, options.split_seed) if options.holds_out else 0 for text in texts],
        domains=domains,
        skipped=[str(error) for error in bad],
        empty=sum(isinstance(error, EmptyDocumentError) for error in bad),
    )


def _texts(chunk: Chunk, options: PreprocessOptions) -> tuple[list[str], list[str], list[DataError]]:
    """Of the good documents, with their domains; and what is wrong with the others. Raises DataError."""
    key, render = options.text_key, None
    if options.chat_key is not None:
        key, render = options.chat_key, chat_template(options.tokenizer).render
    made, domains, bad = _of_each(chunk, lambda document: [document.text(key, render)], options)
    return [text for each in made for text in each], domains, bad


def sample_texts(sources: Sequence[Source], options: PreprocessOptions) -> list[str]:
    """Texts of the first documents of some sources, spread over all of them; bad documents are left out."""
    step = max(len(sources) // _SAMPLED_SOURCES, 1)
    found: list[str] = []
    for source in list(sources)[::step][:_SAMPLED_SOURCES]:
        size = 0
        for chunk in split_into_chunks([source], replace(options, skip_bad_documents=True)):
            for text in _texts(chunk, replace(options, skip_bad_documents=True))[0]:
                size += len(text)
                found.append(text)
                if size > _SAMPLE_CHARACTERS:
                    break
            break
    return found


def _tokenize_examples(chunk: Chunk, options: PreprocessOptions, dtype: type[np.number]) -> TokenizedChunk:
    """Conversations, with loss on their answers: as the chat template ends them, without a token of ours."""
    assert options.chat_key is not None
    key, make = options.chat_key, chat_examples(options.tokenizer).examples
    conversations, domains, bad = _of_each(chunk, lambda document: document.examples(key, make), options)
    examples = [example for each in conversations for example in each]
    # Examples of one conversation are held out together.
    places = [place_of(each[-1].text, options.split_seed) for each in conversations for _ in each]
    none: list[np.ndarray] = [np.empty(0, dtype=bool)]
    return TokenizedChunk(
        token_ids=np.array([index for each in examples for index in each.token_ids], dtype=dtype),
        lengths=[len(each.token_ids) for each in examples],
        text_bytes=[len(each.text.encode("utf-8")) for each in examples],
        places=places,
        domains=domains,
        skipped=[str(error) for error in bad],
        empty=sum(isinstance(error, EmptyDocumentError) for error in bad),
        loss=np.concatenate([each.loss for each in examples] or none),
        set_apart=len(examples) - len(conversations),
    )


def _of_each(
    chunk: Chunk, make: Callable[[RawDocument], list[_Made]], options: PreprocessOptions
) -> tuple[list[list[_Made]], list[str], list[DataError]]:
    """What becomes of the good documents, and what is wrong with the others.

    Returns:
        What is made of each good document; if they are stored, the domains of all that is made; an error for
        each bad one.

    Raises:
        DataError: some are bad and ``options`` skip none; names the first few of the chunk.
    """
    made: list[list[_Made]] = []
    domains: list[str] = []
    bad: list[DataError] = []
    for document in chunk.documents:
        try:
            of_document = make(document)
            if options.names_domains:
                domains += [domain_of(document, options)] * len(of_document)
            made.append(of_document)
        except DataError as error:
            bad.append(error)
    if bad and not options.skip_bad_documents:
        raise _bad_documents(bad)
    return made, domains, bad


def _bad_documents(bad: list[DataError]) -> DataError:
    """One error for all that are wrong in a chunk."""
    if len(bad) == 1:
        return bad[0]
    first, *others = (str(error) for error in bad[:_MOST_NAMED])
    left = len(bad) - _MOST_NAMED
    more = f"; and {left:,} more near these" if left > 0 else ""
    return DataError(
        f"{first}; also {'; '.join(others)}{more} (--skip-bad-documents leaves them out and counts them)"
    )
