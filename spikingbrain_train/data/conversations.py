"""A record of chat data, read with care: who says what, and whether there is an answer to learn from.

Pretraining takes what the chat template makes text of. Here every message counts, because loss is on the
answers alone: a misspelt role or an empty answer would teach something else in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.data.chat import read_message

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")
"""What chat templates call who speaks; a template may know others."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where messages keep what an answer was thought out with, unless it stands in the content."""


@dataclass(frozen=True)
class Conversation:
    """Messages with a known role each, as chat templates take them."""

    messages: list[Mapping[str, Any]]
    tools: list[Any] | None
    """Descriptions of functions, as transformers takes them."""
    unlearnt: frozenset[int] = frozenset()
    """Which of the answers bear no loss: those with the weight 0."""

    @property
    def answers(self) -> list[int]:
        """Which of the messages are the assistant's, ascending, at least one."""
        return [number for number, each in enumerate(self.messages) if each["role"] == ASSISTANT]

    @property
    def learnt(self) -> list[int]:
        """Which of the answers bear loss, ascending, at least one."""
        return [number for number in self.answers if number not in self.unlearnt]


def read_conversation(value: Any, record: Mapping[str, Any], template: str) -> Conversation:
    """Check the messages of a record.

    Args:
        value: what its chat field holds: messages of role and content (OpenAI), or of from and value
            (ShareGPT).
        record: all of it. ``tools`` in it are handed to the template; a text in ``system`` becomes the first
            message where no message is the system's. A message of the assistant with ``"weight": 0``, as
            OpenAI's fine-tuning has it, bears no loss.
        template: source of the chat template, which may know other roles than the usual ones.

    Raises:
        ValueError: says which message is wrong, counted from 1.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("it is no list of messages")
    messages = [_checked(message, number, template) for number, message in enumerate(value, start=1)]
    if all(message["role"] != ASSISTANT for message in messages):
        raise ValueError("none of its messages is of the assistant, so there is nothing to learn")
    weights = [_weight(message, number) for number, message in enumerate(messages, start=1)]
    if not any(weights):
        raise ValueError("every answer of the assistant has the weight 0, so there is nothing to learn")
    unlearnt = {number for number, weight in enumerate(weights) if weight == 0}
    system = record.get("system")
    if isinstance(system, str) and system.strip() and all(each["role"] != "system" for each in messages):
        messages.insert(0, {"role": "system", "content": system})
        unlearnt = {number + 1 for number in unlearnt}
    tools = record.get("tools")
    return Conversation(messages, tools if isinstance(tools, list) and tools else None, frozenset(unlearnt))


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """Every text in a message, reasoning first: its content, or the parts of it that are text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    said = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = (*(message.get(field) for field in REASONING_FIELDS), *said)
    return [text for text in texts if isinstance(text, str) and text.strip()]


def functions_of(described: Any) -> list[str]:
    """Names of functions in ``tools`` of a record or ``tool_calls`` of a message, in either form."""
    found = []
    for each in described if isinstance(described, list) else []:
        inner = each.get("function", each) if isinstance(each, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str) and name.strip():
            found.append(name)
    return found


def _weight(message: Mapping[str, Any], number: int) -> int:
    """1 of an answer that bears loss, else 0."""
    if message["role"] != ASSISTANT:
        return 0
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"message {number} has the weight {weight!r}; an answer bears loss (1) or none (0)")
    return int(weight)


def _checked(message: Any, number: int, template: str) -> Mapping[str, Any]:
    """Message ``number`` of a conversation, from 1, without nulls in place of its content."""
    if isinstance(message, dict) and message.get("role") == ASSISTANT and message.get("tool_calls"):
        message = {**message, "content": message.get("content")}
    try:
        known = read_message(message)
    except ValueError:
        fields = ", ".join(sorted(map(str, message))[:8]) if isinstance(message, dict) else ""
        found = f"has the fields {fields or 'none'}" if isinstance(message, dict) else "is no JSON object"
        raise ValueError(f"message {number} {found}, and needs role and content, or from and value") from None
    role, content = known["role"], known["content"]
    if not isinstance(role, str):
        raise ValueError(f"the role of message {number} is {role!r} and no text")
    if role not in ROLES and not any(f"{quote}{role}{quote}" in template for quote in "'\""):
        raise ValueError(
            f"message {number} has the role {role!r}, which is none of {', '.join(ROLES)} and which the chat "
            "template does not know"
        )
    if content is not None and not isinstance(content, (str, list)):
        raise ValueError(f"the content of message {number} ({role}) is no text")
    if role == ASSISTANT and not texts_of(known) and not known.get("tool_calls"):
        raise ValueError(f"message {number} is an empty answer of the assistant")
    return known if content is not None else {**known, "content": ""}
