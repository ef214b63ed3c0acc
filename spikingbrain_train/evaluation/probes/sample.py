"""A probe's question as tokens, and where its answers lie. Without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.probes.materials import Materials


@dataclass(frozen=True)
class Answer:
    """One thing that was asked for."""

    start: int
    """First of its tokens in the continuation."""
    stop: int
    """Behind the last of them."""
    text: str
    """As a text that a model writes has to contain it."""
    depth: float | None = None
    """Where in the context it stands: 0 at the beginning, 1 at the end; None where it has several places."""


@dataclass(frozen=True)
class ProbeSample:
    """One question. Context and continuation together have exactly the length that was asked for."""

    context: list[int]
    """Text with what is hidden in it, question, and the beginning of the answer."""
    continuation: list[int]
    """What a model that has found everything writes."""
    answers: Sequence[Answer]
    """In the continuation."""


class Probe(ABC):
    """A kind of question."""

    name: str
    """On command lines and in metrics."""
    title: str
    """In tables."""
    at_depths: bool = True
    """Whether a sample is made for each depth."""
    is_written: bool = True
    """Whether its answers are text that generation can be searched for."""

    @abstractmethod
    def sample(self, length: int, depth: float, random: Random, materials: Materials) -> ProbeSample:
        """Make a question of exactly ``length`` tokens.

        Args:
            length: tokens of context and continuation.
            depth: where to hide what is asked for, 0 to 1; not read unless ``at_depths``.
            random: where all of its choices come from.
            materials: tokenizer and haystacks.

        Raises:
            ConfigurationError: so few tokens do not hold the question.
        """
