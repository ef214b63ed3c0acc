"""Raw text to indexed tokens: the pipeline behind ``spikingbrain-preprocess``.

One process reads files and writes tokens, in order; worker processes decode, check and tokenize chunks of
documents (:mod:`~spikingbrain_train.data.tokenize_documents`). The output depends on the inputs and the
tokenizer only, not on the number of workers. Nothing appears under the output prefix before everything is
complete; the same command goes on where one was killed or interrupted
(:mod:`~spikingbrain_train.data.preprocess_progress`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikingbrain_train.data.chat import chat_template
from spikingbrain_train.data.chat_loss import chat_examples
from spikingbrain_train.data.dataset_files import ALL_SUFFIXES, existing_files
from spikingbrain_train.data.documents import Source, find_sources
from spikingbrain_train.data.domains import DomainTable
from spikingbrain_train.data.encoders import ChosenEncoder, PlainEncoder, choose_encoder
from spikingbrain_train.data.folders import LeftOut
from spikingbrain_train.data.indexed import DatasetInfo, IndexedDatasetWriter, token_dtype
from spikingbrain_train.data.lengths import describe_dataset
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.preprocess_progress import Progress, can_go_on, key_of_work
from spikingbrain_train.data.preprocess_report import PreprocessPlan, PreprocessReport
from spikingbrain_train.data.split_writers import SplitByPlace, SplitByTokens, SplitWriter
from spikingbrain_train.data.tokenize_documents import sample_texts, split_into_chunks, tokenize, tokenize_all
from spikingbrain_train.data.tokenizers import Tokenizer, load_tokenizer
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.launch import available_cores
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.temporary_folder import temporary_folder

_SAMPLE_BYTES = 4 << 20
"""Text that a dry run tokenizes for its estimate."""
_GIGATOKEN_BYTES = 256 << 20
"""Input that makes a further process worth its start: gigatoken is done with 30 MB a second."""


def plan_preprocessing(options: PreprocessOptions) -> PreprocessPlan:
    """Check inputs, tokenizer and outputs, and tokenize a sample; writes nothing.

    Raises:
        DataError, ConfigurationError: what :func:`preprocess` would say at its start.
    """
    left_out = LeftOut()
    sources, tokenizer = _prepare(options, left_out)
    chosen = _chosen(sources, tokenizer, options)
    documents = text_bytes = tokens = loss_tokens = 0
    whole = True
    for chunk in split_into_chunks(sources, options):
        result = tokenize(chunk, tokenizer, options, token_dtype(tokenizer.vocab_size), chosen.encoder)
        documents += len(result.lengths)
        text_bytes += sum(result.text_bytes)
        tokens += len(result.token_ids)
        loss_tokens += 0 if result.loss is None else int(result.loss.sum())
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
        loss_tokens if options.learns_answers else None,
        None if options.learns_answers else chosen.said,
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
        chosen = _chosen(sources, tokenizer, options)
    report = PreprocessReport(left_out=left_out.describe(), seq_length=options.seq_length)
    report.encoder = None if options.learns_answers else chosen.said
    started = time.perf_counter()
    key = key_of_work(options, sources, tokenizer)
    with _staging_folder(options.output_prefix, key) as staging:
        progress_so_far = Progress(staging, key)
        writers: list[IndexedDatasetWriter] = []
        domains = DomainTable() if options.names_domains else None
        try:
            masked = options.learns_answers
            prefixes = list(options.output_prefixes)
            if options.holds_out_tokens:
                prefixes.append(options.output_prefix)
            for prefix in prefixes:
                kept = progress_so_far.kept.get(f"{Path(prefix).name}.bin", (0, 0))
                writers.append(
                    IndexedDatasetWriter(
                        prefix, tokenizer, staging, domains, with_loss_mask=masked, kept=kept
                    )
                )
            filled = writers
            split: SplitWriter = SplitByPlace(writers, options, domains)
            if options.holds_out_tokens:
                filled = writers[2:]
                split = SplitByTokens(writers[2], writers[:2], options, domains)
            work = _Work(sources, tokenizer, options, chosen, progress_so_far)
            work.write_all(split, filled, report, progress)
            _refuse_nothing(split.documents, report)
            with activity("splitting", split.left_to_write, "B", shown=progress) as done:
                report.held_out = split.settle(done.advance)
            outputs = writers[: len(options.output_prefixes)]
            infos = [writer.finish() for writer in outputs]
            _refuse_empty(options, infos)
            for writer in outputs:
                writer.publish()
        except OSError as error:  # errors of reading are DataErrors already
            raise _unwritable(options.output_prefix, error) from error
        finally:
            for writer in writers:
                writer.close()
    report.seconds = time.perf_counter() - started
    report.datasets = dict(zip(options.output_prefixes, infos, strict=True))
    report.descriptions = [describe_dataset(prefix, options.seq_length) for prefix in options.output_prefixes]
    return report


def _prepare(options: PreprocessOptions, left_out: LeftOut) -> tuple[list[Source], Tokenizer]:
    """Everything that can be refused before work starts."""
    sources = find_sources(options.inputs, left_out)
    written = {
        os.path.realpath(f"{prefix}{suffix}") for prefix in options.output_prefixes for suffix in ALL_SUFFIXES
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
    tokenizer = load_tokenizer(options.tokenizer)
    if options.chat_key is not None:
        chat_template(options.tokenizer)
    if options.learns_answers:
        chat_examples(options.tokenizer)
    return sources, tokenizer


def _chosen(sources: list[Source], tokenizer: Tokenizer, options: PreprocessOptions) -> ChosenEncoder:
    """What tokenizes. Raises ConfigurationError."""
    if options.learns_answers:  # the chat template tokenizes
        return ChosenEncoder(PlainEncoder(tokenizer), "tokenizers", "")
    return choose_encoder(tokenizer, options.tokenizer_backend, sample_texts(sources, options))


@dataclass(frozen=True)
class _Work:
    """What is tokenized, and what of it is done."""

    sources: list[Source]
    tokenizer: Tokenizer
    options: PreprocessOptions
    chosen: ChosenEncoder
    progress: Progress

    def write_all(
        self,
        split: SplitWriter,
        filled: Sequence[IndexedDatasetWriter],
        report: PreprocessReport,
        shown: bool,
    ) -> None:
        """Give all documents to ``split``, which ``filled`` writes now."""
        dtype, read = token_dtype(self.tokenizer.vocab_size), 0
        chunks = split_into_chunks(self.sources, self.options)
        size = sum(source.size for source in self.sources)
        by = "" if self.options.learns_answers else f" by {self.chosen.name}"
        with activity(f"tokenizing{by}", size, "B", shown=shown) as done:
            # What a killed call has done comes first.
            for result in self.progress.results(dtype):
                chunk = next(chunks)
                split.add(result)
                report.count(chunk, result)
                read = report.resumed_bytes = chunk.position
            done.advance(read)
            workers = _workers(self.options, self.chosen, size - read)
            for chunk, result in tokenize_all(
                chunks, self.tokenizer, self.options, dtype, self.chosen.encoder, workers
            ):
                split.add(result)
                report.count(chunk, result)
                self.progress.add(result, filled)
                done.advance(chunk.position - read)
                read = chunk.position


def _workers(options: PreprocessOptions, chosen: ChosenEncoder, size: int) -> int:
    """Processes for that many bytes of input."""
    if options.workers is not None:
        return options.workers
    if chosen.name != "gigatoken":
        return available_cores()
    return min(available_cores(), max(1, size // _GIGATOKEN_BYTES))


def _refuse_nothing(documents: int, report: PreprocessReport) -> None:
    if documents == 0:
        raise DataError(
            f"none of the {len(report.skipped)} documents is usable; the first: {report.skipped[0]}"
        )


def _refuse_empty(options: PreprocessOptions, infos: list[DatasetInfo]) -> None:
    total = sum(info.documents for info in infos)
    for prefix, info in zip(options.output_prefixes, infos, strict=True):
        if info.documents == 0:
            raise DataError(
                f"all {total} documents fell on one side of --valid-fraction {options.valid_fraction} and "
                f"{prefix} would be empty: give more documents, another fraction, or cut long text files "
                "with --max-text-chars"
            )


@contextmanager
def _staging_folder(output_prefix: str, key: str) -> Iterator[Path]:
    """A temporary folder beside the output, that of a killed call for the same work if there is one.

    It is removed in the end, unless somebody interrupts.
    """
    prefix = Path(output_prefix)
    with ExitStack() as stack:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            folder = temporary_folder(
                prefix.with_name(f".{prefix.name}"),
                goes_on=lambda abandoned: can_go_on(abandoned, key),
                keeps=lambda error: isinstance(error, KeyboardInterrupt),
            )
            staging = stack.enter_context(folder)
        except OSError as error:
            raise _unwritable(output_prefix, error) from error
        yield staging


def _unwritable(output_prefix: str, error: OSError) -> DataError:
    return DataError(
        f"cannot write {output_prefix}: {error.strerror or error}: free space there or choose another "
        "--output-prefix"
    )
