"""Conversations as text, by the tokenizer's chat template: for pretraining on them, every token a label."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from spikingbrain_train.data.tokenizer_folder import first_line, read_tokenizer_folder
from spikingbrain_train.errors import DataError

CHAT_KEYS = ("messages", "conversations")
"""Fields that usually hold a conversation."""

_ROLES = {"human": "user", "gpt": "assistant"}
"""What the roles of ``{"from": ..., "value": ...}`` messages (ShareGPT) are called in templates; others are
called the same."""


class ChatTemplate:
    """The chat template in a tokenizer folder, run by transformers (in jinja2's sandbox).

    Args:
        folder: a Hugging Face tokenizer folder.

    Raises:
        DataError: there is no tokenizer, or none with a chat template.
    """

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise DataError(
                f"{folder} is no tokenizer folder, so it has no chat template for --chat-key: give a Hugging "
                "Face tokenizer folder with --tokenizer"
            )
        self._tokenizer = read_tokenizer_folder(Path(folder))
        if not self._tokenizer.chat_template:
            raise DataError(
                f"the tokenizer in {folder} has no chat template, which --chat-key needs: give that of the "
                "chat model with --tokenizer, or render the messages to text yourself and name that with "
                "--text-key"
            )

    def render(self, messages: Any) -> str:
        """The text of a conversation, without the prompt for a next answer.

        Args:
            messages: of ``role`` and ``content``, or of ``from`` and ``value``.

        Raises:
            ValueError: they are no messages, or the template refuses them.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("it is no list of messages")
        known = [_message(message) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(known, tokenize=False, add_generation_prompt=False)
        except Exception as error:  # whatever jinja2 and the template raise
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from error


@lru_cache(maxsize=1)
def chat_template(folder: str) -> ChatTemplate:
    """The template of ``folder``, read once in a process."""
    return ChatTemplate(folder)


def _message(message: Any) -> Mapping[str, Any]:
    if isinstance(message, dict) and "role" in message and "content" in message:
        return message
    if isinstance(message, dict) and "from" in message and "value" in message:
        return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    raise ValueError("a message has neither role and content nor from and value")
