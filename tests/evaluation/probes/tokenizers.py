"""Tokenizers that part where probes could trip: bytes, words, a space in front, pieces across anchors."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Bytes:
    """A token for each byte."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Words:
    """A token for each word with the space in front of it, number, sign and line break.

    Args:
        space_in_front: put a space in front of a text, as sentencepiece does.
        split_digits: a token for each digit.
    """

    vocab_size = 4096

    def __init__(self, *, space_in_front: bool = False, split_digits: bool = False) -> None:
        digits = r" ?\d" if split_digits else r" ?\d+"
        self._pattern = re.compile(rf"{digits}| ?[^\W\d]+|\s|[^\w\s]")
        self._space = " " if space_in_front else ""
        self._words: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [
            self._words.setdefault(word, len(self._words))
            for word in self._pattern.findall(self._space + text)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        known = list(self._words)
        return "".join(known[index] if index < len(known) else f" w{index}" for index in ids)


class Pieces:
    """The longest of some pieces that fits, else a byte.

    Args:
        pieces: may reach across words, lines and what stands between them.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = sorted({piece.encode() for piece in pieces}, key=len, reverse=True)
        self.vocab_size = 256 + len(self._pieces)

    def encode(self, text: str) -> list[int]:
        rest, ids = text.encode(), []
        while rest:
            index = next((i for i, piece in enumerate(self._pieces) if rest.startswith(piece)), None)
            ids.append(rest[0] if index is None else 256 + index)
            rest = rest[1 if index is None else len(self._pieces[index]) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        parts = [bytes([index]) if index < 256 else self._pieces[index - 256] for index in ids]
        return b"".join(parts).decode(errors="replace")
