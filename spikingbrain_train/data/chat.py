"""Conversations as text, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from spikingbrain_train.data.tokenizer_folder import first_line, read_tokenizer_folder
from spikingbrain_train.errors import DataError

CHAT_KEYS = ("messages", "conversations")
"""Fields that usually hold a conversation."""

_PARTS = "a template that knows no parts wants a content that is text"

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
        self.folder = folder
        self.tokenizer = read_tokenizer_folder(Path(folder))
        if not self.tokenizer.chat_template:
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
        return self.apply([read_message(message) for message in messages])

    def source(self, tools: Any = None) -> str:
        """The template itself, in jinja2's language; some tokenizers have one of their own for tools."""
        return self.tokenizer.get_chat_template(tools=tools)

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """What transformers' apply_chat_template gives for messages of ``role`` and ``content``.

        Raises:
            ValueError: the template refuses them.
        """
        has_parts = any(isinstance(message.get("content"), (list, dict)) for message in messages)
        try:
            applied = self.tokenizer.apply_chat_template(
                list(messages),
                **({"tools": tools} if tools else {}),
                tokenize=tokenize,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except Exception as error:  # whatever jinja2 and the template raise
            hint = f"; {_PARTS}" if has_parts else ""
            raise ValueError(f"the chat template refuses it: {first_line(error)}{hint}") from error
        if has_parts and isinstance(applied, str):
            for number, message in enumerate(messages, start=1):
                content = message.get("content")
                if isinstance(content, (list, dict)) and content and str(content) in applied:
                    raise ValueError(
                        f"the chat template writes the content of message {number} with its brackets and "
                        f"quotes; {_PARTS}"
                    )
        return applied


@lru_cache(maxsize=1)
def chat_template(folder: str) -> ChatTemplate:
    """The template of ``folder``, read once in a process."""
    return ChatTemplate(folder)


def read_message(message: Any) -> Mapping[str, Any]:
    """A message of ``role`` and ``content``, whichever way it is written. Raises ValueError."""
    if isinstance(message, dict) and "role" in message and "content" in message:
        # A template would write None where a call of tools has null for its text.
        return message if message["content"] is not None else {**message, "content": ""}
    if isinstance(message, dict) and "from" in message and "value" in message:
        return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    raise ValueError("a message has neither role and content nor from and value")
