"""Tokens drawn from a vocabulary, where there is no text to take them from."""

from __future__ import annotations

import torch
from torch import Tensor

_UNRANKED = 256  # byte-pair vocabularies begin with the bytes, in no order of frequency


def draw_tokens(vocab_size: int, number: int, generator: torch.Generator, *, distinct: bool) -> Tensor:
    """[number] int64 token ids with probability ~ 1 / (id + 256).

    After the bytes, byte-pair vocabularies are in order of frequency, and frequencies of words follow Zipf's
    law, so this comes nearer to text than equal probabilities.

    Args:
        vocab_size: ids are below it.
        number: how many.
        generator: random numbers.
        distinct: draw no id twice; ``number`` may be at most ``vocab_size`` then.
    """
    weights = 1 / (torch.arange(vocab_size, dtype=torch.float64) + _UNRANKED)
    return torch.multinomial(weights, number, replacement=not distinct, generator=generator)
