"""What preprocessing found out or did, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from spikingbrain_train.data.documents import Source
from spikingbrain_train.data.indexed import DatasetInfo
from spikingbrain_train.data.lengths import DatasetDescription
from spikingbrain_train.data.tokenize_documents import Chunk, TokenizedChunk
from spikingbrain_train.data.tokenizers import Tokenizer
from spikingbrain_train.reporting.tables import table

_FAR = 1.5
"""A share of tokens that is so many times as large or as small as asked for is worth a warning."""


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
    sampled_loss_tokens: int | None = None
    """Of examples, how many of the sampled tokens carry loss."""
    encoder: str | None = None
    """Which library tokenizes, and why; None of examples."""

    @property
    def _kinds(self) -> str:
        return "bin,idx,json" if self.sampled_loss_tokens is None else "bin,idx,json,loss_mask"

    def describe(self) -> str:
        """What a run would do, for people."""
        loss = ""
        if self.sampled_loss_tokens is not None:
            loss = f", {self.sampled_loss_tokens / max(self.sampled_tokens, 1):.1%} of them with loss"
        size = sum(source.size for source in self.sources)
        per_token = self.sampled_bytes / max(self.sampled_tokens, 1)
        return "\n".join(
            [
                f"inputs: {len(self.sources)}, {size / 1e6:,.1f} MB on disk, first {self.sources[0].name}",
                f"tokenizer: {self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids, eos "
                f"{self.tokenizer.eos_id}, stored as {self.dtype}",
                f"{'all' if self.whole else 'first'} {self.sampled_documents:,} documents: "
                f"{self.sampled_bytes / 1e6:,.1f} MB of text, {self.sampled_tokens:,} tokens, "
                f"{per_token:.2f} bytes per token{loss}",
                *([] if self.encoder is None else [self.encoder]),
                *self.left_out,
                f"would write: {', '.join(f'{prefix}.{{{self._kinds}}}' for prefix in self.outputs)}",
            ]
        )


@dataclass(frozen=True)
class HeldOut:
    """What was held out, and what had been asked for."""

    flag: str
    wanted: float
    """Its value."""
    documents: int
    of_documents: int
    tokens: int
    of_tokens: int
    edge_tokens: int = 0
    """Where tokens were asked for: those of the document that would have come nearer if it could be cut."""

    @property
    def share_of_tokens(self) -> float:
        """Of all."""
        return self.tokens / self.of_tokens

    def describe(self) -> str:
        """What it got, and why it is not exactly what was asked for."""
        text = (
            f"held out {self.documents:,} of {self.of_documents:,} documents "
            f"({self.documents / self.of_documents:.2%}) with {self.tokens:,} of {self.of_tokens:,} tokens "
            f"({self.share_of_tokens:.2%}) for {self.flag} {self.wanted:,}"
        )
        if self.edge_tokens and self.tokens != self.wanted_tokens:
            word = "next" if self.tokens < self.wanted_tokens else "last"
            text += f": documents stay whole, and the {word} one has {self.edge_tokens:,} tokens"
        return text

    @property
    def wanted_tokens(self) -> float:
        """Tokens that were asked for; a share of documents asks for the same share of tokens here."""
        return self.wanted if self.flag == "--valid-tokens" else self.wanted * self.of_tokens

    def warnings(self) -> list[str]:
        """A sentence where the tokens held out are far from what was asked for."""
        ratio = self.tokens / self.wanted_tokens
        if 1 / _FAR <= ratio <= _FAR:
            return []
        found = f"those held out have {self.share_of_tokens:.2%} of the tokens"
        if self.flag == "--valid-fraction":
            return [
                f"--valid-fraction {self.wanted} counts documents, and {found}: "
                f"--valid-token-fraction {self.wanted} counts tokens"
            ]
        return [
            f"{self.flag} {self.wanted:,} asks for {self.wanted_tokens:,.0f} tokens, but documents are held "
            f"out whole and {found}: give more documents, or cut long text files with --max-text-chars"
        ]


@dataclass
class PreprocessReport:
    """What a run wrote."""

    datasets: dict[str, DatasetInfo] = field(default_factory=dict)
    """Sidecar of each output prefix."""
    descriptions: list[DatasetDescription] = field(default_factory=list)
    """Each of them with the lengths of its documents."""
    skipped: list[str] = field(default_factory=list)
    """One sentence for each document left out, with file and line."""
    empty: int = 0
    """How many of those hold no text."""
    cut_files: int = 0
    """Text files that were cut into several documents."""
    pieces: int = 0
    """Documents that those were cut into."""
    held_out: HeldOut | None = None
    """None where nothing was."""
    left_out: list[str] = field(default_factory=list)
    """What lies among the inputs and was not read, a line for each kind."""
    set_apart: int = 0
    """Answers that became examples of their own, because the chat template shows them otherwise later."""
    seq_length: int | None = None
    """Of the training that examples are meant for."""
    encoder: str | None = None
    """Which library tokenized, and why; None of examples, which the chat template tokenizes."""
    resumed_bytes: int = 0
    """Of the inputs, what a killed call had done."""
    seconds: float = 0.0
    """Wall time, loading the tokenizer excluded."""

    def count(self, chunk: Chunk, result: TokenizedChunk) -> None:
        """Take note of a chunk that was tokenized."""
        self.skipped += result.skipped
        self.empty += result.empty
        self.set_apart += result.set_apart
        for document in chunk.documents:
            if document.piece == 2:
                self.cut_files += 1
                self.pieces += 1
            self.pieces += document.piece is not None and document.piece > 1

    @property
    def warnings(self) -> list[str]:
        """What a user ought to look at."""
        return [] if self.held_out is None else self.held_out.warnings()

    def describe(self) -> str:
        """What was written, for people: one line a dataset and a total."""
        tokens = sum(info.tokens for info in self.datasets.values())
        text_bytes = sum(info.text_bytes for info in self.datasets.values())
        seconds = max(self.seconds, 1e-9)
        lines = [*length_table(self.descriptions), *answer_table(self.descriptions, self.seq_length)]
        if self.set_apart:
            lines.append(
                f"{self.set_apart:,} answers became examples of their own: the chat template shows them in "
                "another form once the conversation goes on, as it leaves earlier reasoning out"
            )
        kinds = sorted({info.dtype for info in self.datasets.values()})
        lines.append(
            f"{seconds:,.1f} s: {tokens / seconds:,.0f} tokens/s, {text_bytes / seconds / 1e6:.2f} MB/s of "
            f"text; stored as {', '.join(kinds)}"
        )
        if self.encoder is not None:
            lines.append(self.encoder)
        if self.resumed_bytes:
            lines.append(
                f"went on where an earlier call had stopped, behind {self.resumed_bytes / 1e6:,.1f} MB of "
                "the inputs"
            )
        if self.held_out is not None:
            lines.append(self.held_out.describe())
        if self.cut_files:
            lines.append(
                f"cut {self.cut_files:,} text files into {self.pieces:,} documents (--max-text-chars)"
            )
        if self.skipped:
            lines.append(
                f"dropped {len(self.skipped):,} bad documents, {self.empty:,} of them empty; the first: "
                f"{self.skipped[0]}"
            )
        return "\n".join([*lines, *self.left_out, *(f"warning: {text}" for text in self.warnings)])

    def as_values(self) -> dict[str, Any]:
        """The same for programs, as JSON takes it."""
        tokens = sum(info.tokens for info in self.datasets.values())
        return {
            "datasets": [each.as_values() for each in self.descriptions],
            "held_out": None if self.held_out is None else asdict(self.held_out),
            "documents_dropped": len(self.skipped),
            "documents_empty": self.empty,
            "answers_set_apart": self.set_apart,
            "text_files_cut": self.cut_files,
            "documents_from_cut_files": self.pieces,
            "seconds": self.seconds,
            "tokens_per_second": tokens / max(self.seconds, 1e-9),
            "tokenized_by": self.encoder,
            "not_read": self.left_out,
            "warnings": self.warnings,
        }


def length_table(descriptions: Sequence[DatasetDescription]) -> list[str]:
    """A row for each dataset, with the lengths of its documents in tokens."""
    names = ["documents", "tokens", "min", "median", "mean", "p99", "max"]
    rows = [["dataset", *names, "bytes/token"]]
    for each in descriptions:
        numbers = each.summary
        per_token = "-" if each.bytes_per_token is None else f"{each.bytes_per_token:.2f}"
        cells = [numbers.documents, numbers.tokens, numbers.min, numbers.median]
        rows.append(
            [
                each.prefix,
                *(f"{cell:,}" for cell in cells),
                f"{numbers.mean:,.1f}",
                f"{numbers.p99:,}",
                f"{numbers.max:,}",
                per_token,
            ]
        )
    return table(rows, left=1)


def answer_table(descriptions: Sequence[DatasetDescription], seq_length: int | None) -> list[str]:
    """A row for each dataset of examples: how many answers, and how much of it carries loss."""
    rows = [["dataset", "examples", "answers", "tokens with loss", "share"]]
    if seq_length is not None:
        rows[0] += [f"longer than {seq_length:,}", "without loss in it"]
    for each in descriptions:
        if each.answers is None:
            continue
        found = each.answers
        share = found.loss_tokens / max(each.summary.tokens, 1)
        cells = [each.summary.documents, found.turns, found.loss_tokens]
        row = [each.prefix, *(f"{cell:,}" for cell in cells), f"{share:.1%}"]
        if found.longer is not None and found.without_loss is not None:
            row += [f"{found.longer:,}", f"{found.without_loss:,}"]
        rows.append(row)
    return table(rows, left=1) if len(rows) > 1 else []
