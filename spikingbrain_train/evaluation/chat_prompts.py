"""Prompts of chat models: what a user says, by the chat template, up to where the answer begins."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import ConfigurationError, DataError

_ANSWER = "(answer)"
"""Stands for one, to see what the template writes behind it."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that waits for the assistant's answer."""

    text: str
    """With all special tokens that the template writes; none are put around it."""
    ends: frozenset[int]
    """Special tokens that the template writes behind an answer."""


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """The flags of chats."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="take every --prompt as what a user says to a chat model, by the tokenizer's chat template, and "
        "stop where the answer ends",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="with --chat, what the system says before (default: the template's)"
    )


def check_chat_options(arguments: argparse.Namespace) -> None:
    """Raise ConfigurationError for a system without a chat."""
    if arguments.system is not None and not arguments.chat:
        raise ConfigurationError("--system is what the system says in a chat; add --chat, or leave it out")


def chat_prompt(tokenizer: Any, path: Path, message: str, system: str | None = None) -> ChatPrompt:
    """The prompt for an answer to ``message``.

    Args:
        tokenizer: of transformers.
        path: where it was read, for the sentence.
        message: what the user says.
        system: what the system says before; None leaves that to the template.

    Raises:
        DataError: there is no chat template, or it refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer in {path} has no chat template, which --chat needs; name that of the chat model "
            "with --tokenizer, or write the prompt out yourself without --chat"
        )
    said = [{"role": "system", "content": system}] if system is not None else []
    said.append({"role": "user", "content": message})
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        answered = [*said, {"role": "assistant", "content": _ANSWER}]
        behind = tokenizer.apply_chat_template(answered, tokenize=False).rpartition(_ANSWER)[2]
    except Exception as error:  # whatever jinja2 and the template raise
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the chat template in {path} refuses the conversation ({reason}); leave --system out, or write "
            "the prompt out yourself without --chat"
        ) from error
    special = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return ChatPrompt(text, frozenset([index for index in ids if index in special][:1]))
