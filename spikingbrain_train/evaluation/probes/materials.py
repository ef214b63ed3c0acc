"""What probes are made of: the model's tokenizer, haystacks, tokens of its vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

from spikingbrain_train.evaluation.probes.haystacks import Haystacks, Text
from spikingbrain_train.evaluation.probes.segments import Segments, TextTokenizer

_TRIES = 16
"""For each word that is wanted, until a vocabulary counts as one with too few."""


class Materials:
    """Of one tokenizer.

    Args:
        tokenizer: of the model.
        begin: ids that its texts begin with.
        text: for probes that hide something in a text; None takes Python's documentation topics.
    """

    def __init__(self, tokenizer: TextTokenizer, begin: Sequence[int] = (), text: Text | None = None) -> None:
        self.tokenizer = tokenizer
        self.segments = Segments(tokenizer, begin)
        self.haystacks = Haystacks(self.segments, text)
        self._words: dict[int, bool] = {}

    def distinct_tokens(self, number: int, random: Random, without: Collection[int]) -> list[int]:
        """Different tokens of the vocabulary but some: words or parts of words where it has enough of them.

        Fewer than ``number`` where it has no more.
        """
        count = self.tokenizer.vocab_size
        found: dict[int, None] = {}
        for _ in range(_TRIES * number):
            if len(found) == number:
                return list(found)
            token = random.randrange(count)
            if token not in without and self._is_word(token):
                found[token] = None
        others = [token for token in range(count) if token not in without]
        return random.sample(others, min(number, len(others)))

    def _is_word(self, token: int) -> bool:
        if token not in self._words:
            try:
                self._words[token] = self.tokenizer.decode([token]).strip().isalnum()
            except IndexError:  # sentencepiece, of an id that the model has and the tokenizer lacks
                self._words[token] = False
        return self._words[token]
