"""What a user chooses about generated text. Checked before torch is there."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.errors import ConfigurationError

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
        if not 0 <= self.seed < _SEEDS:
            raise ConfigurationError(f"--seed is {self.seed}; give a number from 0 up to below 2**32")
