"""What needles are hidden in: five sentences said again and again, or the sentences of a text."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import NamedTuple

from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.probes.segments import Segments

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""Of the pass key (arXiv 2305.16300) and of RULER (arXiv 2404.06654)."""

_FEWEST_SENTENCES = 8
_MOST_WORDS = 40
"""Of a sentence: what has none for long (tables, code) is cut, so that depths can be met."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


class Hay(NamedTuple):
    """Some of a haystack."""

    begun: list[int]
    """The end of a piece that did not fit whole; nothing is hidden in front of it."""
    pieces: list[list[int]]
    """Whole ones."""


class Haystack:
    """Pieces of text, encoded once.

    Args:
        pieces: ids of each, in order; after the last comes the first again.
    """

    def __init__(self, pieces: Sequence[list[int]]) -> None:
        self.pieces = [piece for piece in pieces if piece]

    def take(self, tokens: int, first: int = 0) -> Hay:
        """So many tokens, from piece ``first`` on, behind the end of one that did not fit."""
        pieces: list[list[int]] = []
        index = first
        while tokens >= len(piece := self.pieces[index % len(self.pieces)]):
            pieces.append(piece)
            tokens -= len(piece)
            index += 1
        return Hay(piece[len(piece) - tokens :], pieces)

    def take_from_anywhere(self, tokens: int, random: Random) -> Hay:
        """The same from a random piece on."""
        return self.take(tokens, random.randrange(len(self.pieces)))


class Text:
    """Sentences of a text whose line breaks carry no meaning.

    Args:
        text: all of it.
        name: what to call it in results and sentences.

    Raises:
        DataError: it has hardly a sentence.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        words = " ".join(text.split())
        self.sentences = [
            part for sentence in _SENTENCE_END.split(words) if sentence for part in _short_parts(sentence)
        ]
        if len(self.sentences) < _FEWEST_SENTENCES:
            raise DataError(
                f"{name} has {len(self.sentences)} sentences, too few to hide something in; give a text of "
                f"at least {_FEWEST_SENTENCES}"
            )
        self.digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        """Of its words, to tell results of different texts apart."""

    @classmethod
    def read(cls, path: Path) -> Text:
        """A text file in UTF-8. Raises DataError where it is none."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--probe-text {path} cannot be read as UTF-8 text ({error}); give a text file"
            ) from error

    @classmethod
    def of_python(cls) -> Text:
        """Python's own documentation topics, which lie beside its standard library."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DataError(
                "this Python came without its documentation topics (pydoc_data), which probes take for a "
                "text when none is given; name a text file with --probe-text"
            ) from error
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return cls("\n".join(topics[name] for name in sorted(topics)), f"topics of Python {version}")


def _short_parts(sentence: str) -> list[str]:
    words = sentence.split(" ")
    return [" ".join(words[at : at + _MOST_WORDS]) for at in range(0, len(words), _MOST_WORDS)]


class Haystacks:
    """The haystacks of one tokenizer.

    Args:
        segments: encodes them.
        text: for probes that hide something in a text; None takes Python's documentation topics.
    """

    def __init__(self, segments: Segments, text: Text | None = None) -> None:
        self._segments = segments
        self._text = text

    @cached_property
    def noise(self) -> Haystack:
        """The five sentences, behind one another."""
        return Haystack([self._segments.inside(f" {sentence}") for sentence in NOISE])

    @cached_property
    def noise_lines(self) -> Haystack:
        """The five sentences a line."""
        return Haystack([self._segments.line(" ".join(NOISE) + "\n")])

    @cached_property
    def text(self) -> Text:
        """What :attr:`prose` is made of."""
        return Text.of_python() if self._text is None else self._text

    @property
    def text_read(self) -> dict[str, str] | None:
        """Name and digest of the text, None where no probe has read it."""
        if "text" not in vars(self):
            return None
        return {"name": self.text.name, "digest": self.text.digest}

    @cached_property
    def prose(self) -> Haystack:
        """The sentences of the text."""
        return Haystack([self._segments.inside(f" {sentence}") for sentence in self.text.sentences])
