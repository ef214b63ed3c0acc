"""Documents on their way to the datasets for training and for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from spikingbrain_train.data.domains import DomainTable
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.preprocess_report import HeldOut
from spikingbrain_train.data.split import is_among, split_by_tokens
from spikingbrain_train.data.tokenize_documents import TokenizedChunk
from spikingbrain_train.errors import DataError

_BLOCK_TOKENS = 1 << 22


class SplitWriter(ABC):
    """Takes chunks in their order and writes documents, in that order, to where they belong."""

    left_to_write = 0
    """Bytes that :meth:`settle` moves, once all documents are there."""

    @property
    @abstractmethod
    def documents(self) -> int:
        """Documents so far."""

    @abstractmethod
    def add(self, result: TokenizedChunk) -> None:
        """Take the documents of a chunk."""

    @abstractmethod
    def settle(self, advance: Callable[[int], Any]) -> HeldOut | None:
        """All documents are there: finish their way, and say what was held out.

        Args:
            advance: called with the number of bytes moved since the last call.
        """


class SplitByPlace(SplitWriter):
    """A share of the documents, by their places: each goes where it belongs as it comes.

    Args:
        writers: of the only dataset, or of train and valid.
        options: the share.
        domains: numbers of domains, which writers that store them share; None where they do not.
    """

    def __init__(
        self,
        writers: Sequence[IndexedDatasetWriter],
        options: PreprocessOptions,
        domains: DomainTable | None = None,
    ) -> None:
        self._writers = list(writers)
        self._domains = domains
        self._fraction = options.valid_fraction

    @property
    def documents(self) -> int:
        return sum(writer.documents for writer in self._writers)

    def add(self, result: TokenizedChunk) -> None:
        end = 0
        numbers = None if self._domains is None else self._domains.numbers(result.domains)
        if len(self._writers) == 1:
            (writer,) = self._writers
            lengths = np.asarray(result.lengths, dtype=np.int64)
            writer.add_documents(result.token_ids, lengths, sum(result.text_bytes), numbers, result.loss)
            return
        documents = zip(result.lengths, result.text_bytes, result.places, strict=True)
        for number, (length, size, place) in enumerate(documents):
            end += length
            writer = self._writers[is_among(place, self._fraction)]
            domain = None if numbers is None else numbers[number : number + 1]
            loss = None if result.loss is None else result.loss[end - length : end]
            writer.add_documents(result.token_ids[end - length : end], np.array([length]), size, domain, loss)

    def settle(self, advance: Callable[[int], Any]) -> HeldOut | None:
        if len(self._writers) == 1:
            return None
        train, valid = self._writers
        return HeldOut(
            "--valid-fraction",
            self._fraction,
            documents=valid.documents,
            of_documents=valid.documents + train.documents,
            tokens=valid.tokens,
            of_tokens=valid.tokens + train.tokens,
        )


class SplitByTokens(SplitWriter):
    """A number or a share of tokens: which documents that is shows when all are there.

    Until then they lie in one file. In memory are 20 bytes a document.

    Args:
        whole: of that file, which is not to be published.
        writers: of train and valid.
        options: how many tokens are held out.
        domains: numbers of domains, which writers that store them share; None where they do not.
    """

    def __init__(
        self,
        whole: IndexedDatasetWriter,
        writers: Sequence[IndexedDatasetWriter],
        options: PreprocessOptions,
        domains: DomainTable | None = None,
    ) -> None:
        self._whole = whole
        self._domains = domains
        self._train, self._valid = writers
        self._options = options
        self._places, self._sizes = array("Q"), array("q")

    @property
    def documents(self) -> int:
        return self._whole.documents

    def add(self, result: TokenizedChunk) -> None:
        numbers = None if self._domains is None else self._domains.numbers(result.domains)
        lengths = np.asarray(result.lengths, dtype=np.int64)
        self._whole.add_documents(result.token_ids, lengths, sum(result.text_bytes), numbers, result.loss)
        self._places.extend(result.places)
        self._sizes.extend(result.text_bytes)
        self.left_to_write += result.token_ids.nbytes

    def settle(self, advance: Callable[[int], Any]) -> HeldOut | None:
        tokens_path, lengths, loss_path = self._whole.take_tokens()
        flag, wanted = self._asked_for()
        tokens = wanted if flag == "--valid-tokens" else wanted * self._whole.tokens
        if tokens >= self._whole.tokens:
            raise DataError(
                f"{flag} {wanted} leaves nothing to train on: all documents together have "
                f"{self._whole.tokens} tokens; hold out fewer"
            )
        split = split_by_tokens(np.frombuffer(self._places, np.uint64), lengths, round(tokens))
        sizes = np.frombuffer(self._sizes, np.int64)
        domains = self._whole.document_domains
        ends = np.cumsum(lengths, dtype=np.int64)
        first = 0
        with ExitStack() as files:
            file = files.enter_context(open(tokens_path, "rb"))
            loss_file = None if loss_path is None else files.enter_context(open(loss_path, "rb"))
            while first < len(lengths):
                done = int(ends[first - 1]) if first else 0
                end = max(int(np.searchsorted(ends, done + _BLOCK_TOKENS, side="right")), first + 1)
                block = np.fromfile(file, dtype=self._whole.dtype, count=int(ends[end - 1]) - done)
                loss = None if loss_file is None else np.fromfile(loss_file, dtype=bool, count=len(block))
                held_out, of_block = split.held_out[first:end], lengths[first:end]
                of_token = np.repeat(held_out, of_block)
                for writer, side, of_side in (
                    (self._valid, held_out, of_token),
                    (self._train, ~held_out, ~of_token),
                ):
                    writer.add_documents(
                        block[of_side],
                        of_block[side],
                        int(sizes[first:end][side].sum()),
                        None if domains is None else domains[first:end][side],
                        None if loss is None else loss[of_side],
                    )
                advance(block.nbytes)
                first = end
        return HeldOut(
            flag,
            wanted,
            documents=self._valid.documents,
            of_documents=len(lengths),
            tokens=split.tokens,
            of_tokens=self._whole.tokens,
            edge_tokens=split.edge_tokens,
        )

    def _asked_for(self) -> tuple[str, float]:
        options = self._options
        if options.valid_tokens is not None:
            return "--valid-tokens", options.valid_tokens
        return "--valid-token-fraction", options.valid_token_fraction or 0.0
