"""Raw text to indexed tokens: the pipeline behind ``spikingbrain-preprocess``.

One process reads files and writes tokens, in order; worker processes decode, check and tokenize chunks of
documents (:mod:`~spikingbrain_train.data.tokenize_documents`). The output depends on the inputs and the
tokenizer only, not on the number of workers. Nothing appears under the output prefix before everything is
complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spikingbrain_train.data.dataset_files import SUFFIXES, existing_files
from spikingbrain_train.data.documents import Source, find_sources
from spikingbrain_train.data.folders import LeftOut
from spikingbrain_train.data.indexed import DatasetInfo, IndexedDatasetWriter, token_dtype
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.tokenize_documents import split_into_chunks, tokenize, tokenize_all
from spikingbrain_train.data.tokenizers import Tokenizer, load_tokenizer
from spikingbrain_train.errors import DataError
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.temporary_folder import temporary_folder

_SAMPLE_BYTES = 4 << 20
"""Text that a dry run tokenizes for its estimate."""


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


def plan_preprocessing(options: PreprocessOptions) -> PreprocessPlan:
    """Check inputs, tokenizer and outputs, and tokenize a sample; writes nothing.

    Raises:
        DataError, ConfigurationError: what :func:`preprocess` would say at its start.
    """
    left_out = LeftOut()
    sources, tokenizer = _prepare(options, left_out)
    documents = text_bytes = tokens = 0
    whole = True
    for chunk in split_into_chunks(sources, options):
        result = tokenize(chunk, tokenizer, options, token_dtype(tokenizer.vocab_size))
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
        for chunk, result in tokenize_all(
            split_into_chunks(sources, options), tokenizer, options, writers[0].dtype
        ):
            end = 0
            for length, size, held_out in zip(
                result.lengths, result.text_bytes, result.held_out, strict=True
            ):
                end += length
                writers[held_out].add_document(result.token_ids[end - length : end], size)
            report.skipped += result.skipped
            done.advance(chunk.position - read)
            read = chunk.position


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
