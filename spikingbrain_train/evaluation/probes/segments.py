"""Parts of a text, each encoded as it is inside of the text, so that their lengths add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_INSIDE, _NEW_LINE = ".", "\n"


class TextTokenizer(Protocol):
    """What a probe needs of a tokenizer; those of :mod:`spikingbrain_train.data.tokenizers` have it."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with no special tokens around them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        ...


class Segments:
    """Encodes parts of a text.

    A tokenizer may treat the beginning of a text otherwise than its middle (sentencepiece puts a space in
    front), so a part is encoded behind an anchor, which is then taken off.

    Args:
        tokenizer: of the model.
        begin: ids that its texts begin with, e.g. a token that begins a text.
    """

    def __init__(self, tokenizer: TextTokenizer, begin: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.begin = list(begin)
        self._anchors = {anchor: list(tokenizer.encode(anchor)) for anchor in (_INSIDE, _NEW_LINE)}

    def first(self, text: str) -> list[int]:
        """Ids of the beginning of a text."""
        return [*self.begin, *self.tokenizer.encode(text)]

    def inside(self, text: str) -> list[int]:
        """Ids of what goes on in a line; ``text`` brings its space."""
        return self._behind(_INSIDE, text)

    def line(self, text: str) -> list[int]:
        """Ids of what begins a line."""
        return self._behind(_NEW_LINE, text)

    def _behind(self, anchor: str, text: str) -> list[int]:
        ids, known = list(self.tokenizer.encode(anchor + text)), self._anchors[anchor]
        # A tokenizer that joins the anchor with what follows gives the part by itself.
        return ids[len(known) :] if ids[: len(known)] == known else list(self.tokenizer.encode(text))
