"""How lm-eval makes token ids of a prompt and an option: its own code on our tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lm_eval.api.model import TemplateLM

from spikingbrain_train.evaluation.score_batches import ScoreRequest
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

_REMEMBERED = 8
"""Prompts whose ids are kept: all options of a question have the same."""


class LmEvalEncoder(TemplateLM):
    """What lm-eval takes for a model, which hands back what it is asked instead of answering.

    Token ids are those that lm-eval's own ``hf`` model would read: special tokens as the tokenizer puts them
    around a text (none where the text begins with its own), a prompt and an option tokenized together and
    parted behind the prompt's tokens.

    Args:
        tokenizer: of the model that is asked.
        max_length: tokens that the model reads at most.
    """

    def __init__(self, tokenizer: TextTokenizer, max_length: int) -> None:
        super().__init__()
        self._text_tokenizer = tokenizer
        self._max_length = max_length
        self._encode = lru_cache(_REMEMBERED)(tokenizer.encode)
        self.shortened = 0
        """Requests so far that lost the beginning of their prompt."""

    def requests(self, instances: Sequence[Any]) -> list[ScoreRequest]:
        """Of lm-eval's instances; too long ones lose the beginning of their prompt, as in lm-eval."""
        found = []
        for context, continuation in self.loglikelihood(list(instances), disable_tqdm=True):
            too_many = len(context) + len(continuation) - (self._max_length + 1)
            if too_many > 0:
                self.shortened += 1
                context = context[min(too_many, len(context) - 1) :]
            found.append(ScoreRequest(context, continuation))
        return found

    @property
    def eot_token_id(self) -> int:
        end = self._text_tokenizer.eos_id
        return 0 if end is None else end

    @property
    def prefix_token_id(self) -> int:
        begin = self._text_tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            beginning = self._text_tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (beginning and string.startswith(beginning))
        return list(self._encode(string, special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("multiple choice asks for continuations alone")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("multiple choice asks for continuations alone")
