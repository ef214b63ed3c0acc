"""What evaluators ask of a language model: how likely texts are, and how it goes on. One seam for all forms.

Behind it is a Hugging Face folder (:mod:`.huggingface_language_model`), or a Megatron checkpoint or a model
in training on all of its ranks (:mod:`.megatron_language_model`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.score_batches import Row, ScoreRequest, rows_of
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.reporting.activity import Activity, activity

__all__ = ["LanguageModel", "Score", "ScoreRequest"]

ShowActivity = Callable[[str, "int | None", str], AbstractContextManager[Activity]]
"""Shows the user what runs: takes its name, the size of the whole and its unit."""

Answer = Callable[[Tensor, Tensor], Tensor]
"""From logits [N, vocab_size] float32 and the tokens asked about [N] to [N, width] float32."""


@dataclass(frozen=True)
class Score:
    """What a model says to a continuation."""

    log_probs: tuple[float, ...]
    """Of each of its tokens, in nats."""
    greedy: tuple[bool, ...]
    """Whether each is the likeliest token at its place."""

    @property
    def log_prob(self) -> float:
        """Of the whole continuation, in nats."""
        return sum(self.log_probs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding writes it."""
        return all(self.greedy)


class LanguageModel(ABC):
    """A causal language model, in evaluation mode.

    Where it lies on several ranks, all of them call every method together with the same arguments, and all
    get the result. Weights, random generators and the mode of the model stay as they are.

    Args:
        tokenizer: of its text.
        vocab_size: token ids that it knows.
        max_length: tokens of a text that its configuration declares. Nothing here refuses or cuts longer
            ones.
        is_main_process: the rank that prints and writes.
        show: shows what runs; None shows it on standard error of the main process.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        vocab_size: int,
        max_length: int,
        is_main_process: bool = True,
        show: ShowActivity | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.is_main_process = is_main_process
        self.activity: ShowActivity = show or self._on_standard_error

    def score(self, requests: Sequence[ScoreRequest], *, what: str = "scoring") -> list[Score]:
        """How likely each continuation is behind its context.

        What several requests share is read once if they part in their last token only. Texts are read in
        batches of about one length; in float32 the numbers depend on that by rounding alone.

        Args:
            requests: (context, continuation) of token ids; a context has at least one.
            what: named beside the progress.

        Raises:
            DataError: an id that the model does not know.
        """
        values = self._answers(requests, _log_prob_and_greedy, 2, what).tolist()
        scores, first = [], 0
        for _, continuation in requests:
            mine = values[first : first + len(continuation)]
            first += len(continuation)
            scores.append(Score(tuple(each[0] for each in mine), tuple(each[1] > 0 for each in mine)))
        return scores

    def log_probs(self, requests: Sequence[ScoreRequest], *, what: str = "reading") -> list[Tensor]:
        """The whole distribution over the next token at every token of each continuation.

        They take 4 * vocab_size bytes a token on every rank: ask for few requests at a time.

        Returns:
            Of each request [len(continuation), vocab_size] float32 log probabilities, in nats, on the model's
            device.
        """
        values = self._answers(requests, _all_log_probs, self.vocab_size, what)
        return list(values.split([len(continuation) for _, continuation in requests]))

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        end_tokens: Collection[int] = (),
        what: str = "generating",
    ) -> list[list[int]]:
        """Greedy continuations.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: ids to add.
            end_tokens: a continuation ends with the first of these, which it includes; without any, all have
                ``max_new_tokens``.
            what: named beside the progress.
        """

    def choose(self, choice: str | None) -> None:
        """Compute from here on with one of the adapters beside the weights, the others off.

        Args:
            choice: by name; None switches all of them off.

        Raises:
            ConfigurationError: there are none of which one could be chosen.
        """
        raise ConfigurationError("the model has no adapters of which one could be chosen for a text")

    @abstractmethod
    def _read(self, rows: Sequence[Row], answers: Tensor, answer: Answer, what: str) -> None:
        """Read every row and put what ``answer`` says into ``answers`` at the rows' slots, on every rank.

        Args:
            rows: at least one.
            answers: [number of slots, width] float32 zeros on :meth:`_device`.
            answer: see :data:`Answer`.
            what: named beside the progress.
        """

    @property
    @abstractmethod
    def _device(self) -> torch.device:
        """Where this rank's tensors live."""

    def _answers(self, requests: Sequence[ScoreRequest], answer: Answer, width: int, what: str) -> Tensor:
        """[tokens of all continuations, width] float32."""
        slots = sum(len(continuation) for _, continuation in requests)
        answers = torch.zeros(slots, width, dtype=torch.float32, device=self._device)
        rows = rows_of(requests)
        if rows:
            self._check_ids([ids for request in requests for ids in request])
            with torch.no_grad():
                self._read(rows, answers, answer, what)
        return answers

    def _check_ids(self, texts: Sequence[Sequence[int]]) -> None:
        largest = max((max(ids) for ids in texts if len(ids)), default=0)
        if largest >= self.vocab_size:
            raise DataError(
                f"the tokenizer {self.tokenizer.path} gives a text the id {largest}, but the model knows "
                f"{self.vocab_size}; name the tokenizer of its data with --tokenizer"
            )

    def _on_standard_error(self, what: str, total: int | None, unit: str) -> AbstractContextManager[Activity]:
        return activity(what, total, unit, shown=self.is_main_process)


def padded_tokens(rows: Sequence[Row], num_rows: int, length: int) -> Tensor:
    """[num_rows, length] int64 on the CPU, token 0 behind each text and in rows that are too many."""
    tokens = torch.zeros(num_rows, length, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
    return tokens


def until_end(ids: Sequence[int], end_tokens: Collection[int]) -> list[int]:
    """``ids`` up to the first of ``end_tokens``, which stays."""
    for index, token in enumerate(ids):
        if token in end_tokens:
            return list(ids[: index + 1])
    return list(ids)


def _log_prob_and_greedy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    log_probs_N = logits_NV.log_softmax(-1).gather(1, targets_N.unsqueeze(1)).squeeze(1)
    return torch.stack((log_probs_N, (logits_NV.argmax(-1) == targets_N).float()), dim=1)


def _all_log_probs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.log_softmax(-1)
