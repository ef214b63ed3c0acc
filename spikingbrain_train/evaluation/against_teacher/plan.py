"""Which teacher a student is held against, and on how much text. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 100, 64, 64
_MOST = 2**31


@dataclass(frozen=True)
class TeacherPlan:
    """What is compared."""

    teacher: Path
    """Hugging Face folder or Megatron checkpoint."""
    data: tuple[str, ...]
    """Prefixes of held-out datasets, from which prompts are taken."""
    prompts: int = PROMPTS
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    """That both write behind each prompt."""

    def on(self, data: Sequence[str]) -> TeacherPlan:
        """The same with prompts of other datasets."""
        return replace(self, data=tuple(data))

    def check(self, prefix: str) -> None:
        """Raise ConfigurationError for numbers that do not fit, named with ``prefix`` in front."""
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            if not 0 < value < _MOST:
                setting = name.replace("_", "-") if prefix.startswith("--") else name
                raise ConfigurationError(
                    f"{prefix}{setting} is {value}; give a number of at least 1 and below 2**31"
                )
