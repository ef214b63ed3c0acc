"""Text of a prompt or a question to token ids and back, and the tokens that end a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spikingbrain_train.data.tokenizers import SentencePieceTokenizer
from spikingbrain_train.evaluation.chat_prompts import ChatPrompt, chat_prompt
from spikingbrain_train.evaluation.pretrained import load_text_tokenizer

_GENERATION_CONFIG = "generation_config.json"


class TextTokenizer:
    """The tokenizer of a model's text.

    Args:
        path: folder that transformers reads, or a sentencepiece ``.model`` file. A ``generation_config.json``
            in a folder says which tokens end a text (chat models have several), else the tokenizer does.

    Raises:
        DataError: there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._is_folder = self.path.is_dir()
        load: Callable[[Path], Any] = load_text_tokenizer if self._is_folder else SentencePieceTokenizer
        self._tokenizer = load(self.path)
        self.eos_id: int | None = self._tokenizer.eos_token_id if self._is_folder else self._tokenizer.eos_id
        self.bos_id: int | None = self._tokenizer.bos_token_id if self._is_folder else None
        end = _end_tokens(self.path / _GENERATION_CONFIG)
        if end is None:
            end = [] if self.eos_id is None else [self.eos_id]
        self.end_tokens = set(end)

    def chat_prompt(self, message: str, system: str | None = None) -> ChatPrompt:
        """The prompt for an answer to ``message``.

        Raises:
            DataError: there is no chat template, or it refuses the conversation.
        """
        return chat_prompt(self._tokenizer, self.path, message, system)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Its ids, with the special tokens that the tokenizer puts around a text, or without them."""
        if not self._is_folder:
            return list(self._tokenizer.encode(text))
        return list(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def decode(self, ids: Sequence[int] | Tensor, **options: Any) -> str:
        """Text of ids; options are those of transformers."""
        if self._is_folder:
            return str(self._tokenizer.decode(ids, **options))
        return str(self._tokenizer.decode([int(i) for i in ids]))


def _end_tokens(path: Path) -> list[int] | None:
    try:
        end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):  # absent, or nothing that says so
        return None
    found = end if isinstance(end, list) else [end]
    return found if found and all(isinstance(token, int) for token in found) else None
