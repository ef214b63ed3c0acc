"""Which part of a batch of sequences a rank holds, and where documents begin. Pure Python: no torch.

A sequence is ``num_sink_tokens`` learnable tokens followed by ``text_length`` tokens of text. Context
parallelism cuts it into equal contiguous slices: rank r holds the r-th, so rank 0 holds all sinks and the
first text. Text positions count from the first token of text, whatever the number of sinks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from spikingbrain_train.errors import ConfigurationError

DocumentBounds = tuple[int, ...]
"""Text positions [0, end of document 1, ..., text_length] of one row: ``cu_seqlens`` as in flash-attn and
fla."""


@dataclass(frozen=True)
class LocalDocument:
    """The part of one document that lies in a rank's slice."""

    start: int
    """First text position in the slice."""
    length: int
    """Tokens in the slice, at least 1."""
    before: int
    """Tokens of the same document on earlier ranks."""
    total: int
    """Tokens of the document on all ranks."""


@dataclass(frozen=True)
class SequenceLayout:
    """How the sequences of one micro-batch lie on the context-parallel ranks."""

    text_length: int
    """Tokens of text of the whole sequence, the same in every row."""
    num_sink_tokens: int = 0
    """Tokens in front of the text."""
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    cu_seqlens: tuple[DocumentBounds, ...] | None = None
    """Documents of every row that do not see each other; None where each row is one document."""
    sinks_are_padding: bool = False
    """The tokens in front only give a model without sinks the shape of one with: nothing sees them."""
    sequence_seeds: tuple[str, ...] | None = field(default=None, compare=False)
    """What random numbers of every row are drawn from in training, the same on every rank that holds a part
    of it, whatever the topology and however often a layer is computed."""
    piece: range | None = None
    """Text positions that alone are here, of a text that is read piece by piece on one context-parallel rank;
    None: all of the slice."""

    qkv_format = "sbhd"  # megatron-core looks at this field of what travels as ``packed_seq_params``
    cp_group = None

    def __post_init__(self) -> None:
        length = self.num_sink_tokens + self.text_length
        if length % self.context_parallel_size:
            raise ConfigurationError(
                f"parallel.context_parallel_size={self.context_parallel_size} does not divide the sequence: "
                f"{self.num_sink_tokens} sink tokens + {self.text_length} tokens of text = {length}"
            )
        if self.num_sink_tokens >= self.slice_length:
            raise ConfigurationError(
                f"model.num_sink_tokens={self.num_sink_tokens} leave no text in the first context-parallel "
                f"slice of {self.slice_length} tokens"
            )
        for bounds in self.cu_seqlens or ():
            steps = zip(bounds, bounds[1:], strict=False)
            if bounds[0] != 0 or bounds[-1] != self.text_length or any(a >= b for a, b in steps):
                raise ValueError(f"cu_seqlens {bounds} must rise from 0 to {self.text_length}")

    @classmethod
    def of_piece(cls, piece: range, text_length: int, num_sink_tokens: int) -> SequenceLayout:
        """Some tokens of a text that is read piece by piece.

        Args:
            piece: their positions.
            text_length: of the whole text, as far as it is known.
            num_sink_tokens: in front of the whole text; those of the first piece.
        """
        return cls(text_length, 0 if piece.start else num_sink_tokens, piece=piece)

    def of_piece_alone(self) -> SequenceLayout:
        """The same for whom a piece is all that there is."""
        return self if self.piece is None else replace(self, text_length=len(self.piece), piece=None)

    def without_sinks(self) -> SequenceLayout:
        """The same for a model that has none: what stands in front is padding, so that rows correspond."""
        return replace(self, sinks_are_padding=True) if self.num_sink_tokens else self

    @property
    def slice_length(self) -> int:
        """Tokens that every rank holds, sinks included."""
        if self.piece is not None:
            return self.num_sink_tokens + len(self.piece)
        return (self.num_sink_tokens + self.text_length) // self.context_parallel_size

    @property
    def local_sink_tokens(self) -> int:
        """Sinks at the beginning of this rank's slice."""
        return self.num_sink_tokens if self.context_parallel_rank == 0 else 0

    def num_text_keys(self, window: int | None) -> int:
        """Keys of text that attention gets on this rank: a slice and what its windows reach before.

        That is a fixed number whatever the documents are, because GPU kernels are compiled for every shape:
        what no query sees is a document without queries.

        Args:
            window: text keys that a query sees, its own included; None where ranks take whole sequences.
        """
        if self.context_parallel_size == 1 or window is None:
            return self.text_length
        text = self.text_range()
        return len(text) + min(window - 1, text.start)

    def text_range(self, rank: int | None = None) -> range:
        """Text positions that ``rank`` (default: this one) holds."""
        if self.piece is not None:
            return self.piece
        rank = self.context_parallel_rank if rank is None else rank
        start = rank * self.slice_length - self.num_sink_tokens
        return range(max(0, start), start + self.slice_length)

    def every(self, step: int) -> list[int]:
        """Rows of this rank's slice, sinks counted, of the text positions step - 1, 2 step - 1, ..."""
        text = enumerate(self.text_range(), self.local_sink_tokens)
        return [row for row, position in text if position % step == step - 1]

    def bounds(self, row: int) -> DocumentBounds:
        """Document bounds of a row, over the whole text."""
        return (0, self.text_length) if self.cu_seqlens is None else self.cu_seqlens[row]

    def local_documents(self, row: int, rank: int | None = None) -> list[LocalDocument]:
        """The documents of ``row`` that have tokens on ``rank`` (default: this one), in order."""
        text = self.text_range(rank)
        bounds = self.bounds(row)
        documents = []
        for first, end in zip(bounds, bounds[1:], strict=False):
            start, stop = max(first, text.start), min(end, text.stop)
            if start < stop:
                documents.append(LocalDocument(start, stop - start, start - first, end - first))
        return documents
