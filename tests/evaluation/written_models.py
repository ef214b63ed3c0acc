"""Language models written by hand: what each says to a text is a function of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.evaluation.language_model import Answer, LanguageModel, until_end
from spikingbrain_train.evaluation.score_batches import Row

Next = Callable[[list[int]], int]
"""From the tokens so far to the one that follows."""


class OfTokenizer:
    """A tokenizer of tests as language models see it."""

    path = Path("tokenizer")
    bos_id = None
    eos_id = None

    def __init__(self, tokenizer: Any, end_tokens: Collection[int] = ()) -> None:
        self.end_tokens = set(end_tokens)
        self._tokenizer = tokenizer

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return str(self._tokenizer.decode(ids))


class Written(LanguageModel):
    """Is sure of one token at each place.

    Args:
        following: says which.
        tokenizer: with a ``vocab_size``.
        max_length: that it declares.
        end_tokens: that end a text.
    """

    def __init__(
        self, following: Next, tokenizer: Any, *, max_length: int = 4096, end_tokens: Collection[int] = ()
    ) -> None:
        super().__init__(
            OfTokenizer(tokenizer, end_tokens),  # type: ignore[arg-type]
            vocab_size=tokenizer.vocab_size,
            max_length=max_length,
        )
        self._following = following

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu")

    def _logits(self, tokens: list[int]) -> Tensor:
        logits = torch.zeros(self.vocab_size)
        logits[self._following(tokens)] = 20.0
        return logits

    def _read(self, rows: Sequence[Row], answers: Tensor, answer: Answer, what: str) -> None:
        for row in rows:
            logits_NV = torch.stack([self._logits(list(row.tokens[: at + 1])) for at in row.positions])
            answers[row.slots] = answer(logits_NV, torch.tensor(row.targets))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        end_tokens: Collection[int] = (),
        what: str = "generating",
    ) -> list[list[int]]:
        texts = []
        for prompt in prompts:
            tokens = list(prompt)
            while len(tokens) < len(prompt) + max_new_tokens:
                tokens.append(int(self._logits(tokens).argmax()))
            texts.append(until_end(tokens[len(prompt) :], end_tokens))
        return texts


def copy(tokens: list[int]) -> int:
    """What followed the longest end of the text where it stood last before: an induction head."""
    last = tokens[-1]
    best, found = 0, 0
    for at in range(len(tokens) - 2, -1, -1):
        if tokens[at] != last:
            continue
        same = 1
        while same <= at and same < 16 and tokens[at - same] == tokens[-1 - same]:
            same += 1
        if same > best:
            best, found = same, tokens[at + 1]
    return found
