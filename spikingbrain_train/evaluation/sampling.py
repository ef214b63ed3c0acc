"""What a user chooses about generated text, and what a prompt's length says to it. There is no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spikingbrain_train.errors import ConfigurationError

AUTOMATIC_PIECE = 2048
"""Tokens of a long prompt that are read at a time where nobody says otherwise: more makes nothing faster."""
_MOST_TOKENS, _SEEDS = 2**31, 2**32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_p: float = 0.95
    """Choose among the likeliest tokens whose probabilities sum to this."""
    seed: int = 1234
    prefill_chunk: int | None = None
    """Tokens of a prompt that are read at a time; None chooses by the prompt and the model."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"--max-new-tokens is {self.max_new_tokens}; give at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigurationError(
                f"--temperature is {self.temperature}; give 0 (greedy) or a positive number"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigurationError(f"--top-p is {self.top_p}; give a number above 0 and up to 1")
        if self.max_new_tokens >= _MOST_TOKENS:
            raise ConfigurationError(f"--max-new-tokens is {self.max_new_tokens}; give less than 2**31")
        piece_length(self.prefill_chunk, ())
        if not 0 <= self.seed < _SEEDS:
            raise ConfigurationError(f"--seed is {self.seed}; give a number from 0 up to below 2**32")


def piece_length(
    asked: int | None, mixers_without_step: Sequence[str], *, name: str = "--prefill-chunk"
) -> int | None:
    """Tokens of a prompt that a Megatron checkpoint's model reads at a time; None: all.

    Args:
        asked: by the user; None chooses.
        mixers_without_step: kinds of the model that read their whole input again for every piece.
        name: what the user calls it, for the sentence.

    Raises:
        ConfigurationError: pieces are asked of a model that gains nothing by them.
    """
    if asked is None:
        return None if mixers_without_step else AUTOMATIC_PIECE
    if asked < 1:
        raise ConfigurationError(f"{name} is {asked}; give at least 1, or leave it out")
    if mixers_without_step:
        raise ConfigurationError(
            f"{name} reads a prompt in pieces, but {', '.join(mixers_without_step)} has no "
            "decoding step and would read all before it again for every piece; leave it out"
        )
    return asked


def check_prompt_length(num_tokens: int, declared: int | None) -> None:
    """Refuse a prompt that is longer than the positions of its model.

    Args:
        num_tokens: of the prompt.
        declared: positions that the model turns queries and keys by; None: it knows none.
    """
    if declared is not None and num_tokens > declared:
        raise ConfigurationError(
            f"--prompt has {num_tokens} tokens, but the model's rotary positions are declared up to "
            f"{declared} (max_position_embeddings); shorten it, or extend the model's context by training at "
            "that length"
        )
