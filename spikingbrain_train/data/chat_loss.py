"""Conversations as examples: their tokens, and which of them are the assistant's.

Loss is on all that the assistant says and on the token that ends its turn, not on the header in front. Where
it begins and ends says the chat template: by ``{% generation %}`` blocks where it has them, through
transformers, else by rendering the conversation up to the answer, with the prompt for it, and up to its end,
which must be beginnings of the whole. Templates may render an answer in another way once the conversation has
gone on (those of reasoning models leave earlier reasoning out). Such an answer becomes an example of its own,
in the form in which the model writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from spikingbrain_train.data.chat import ChatTemplate, chat_template
from spikingbrain_train.data.conversations import (
    ASSISTANT,
    Conversation,
    functions_of,
    read_conversation,
    texts_of,
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "7c1e0d52b9"
"""In the place of a message's text, to see whether a template writes it."""
_THINK = re.compile(r"</?think>")
_ADVICE = (
    "give a tokenizer whose template keeps its answers as they are, or put {% generation %} and "
    "{% endgeneration %} around them in its chat_template"
)


@dataclass(frozen=True)
class Example:
    """One sequence of tokens to learn from."""

    text: str
    token_ids: list[int]
    loss: np.ndarray
    """[tokens] bool; at least one is True, and not the first."""


@dataclass(frozen=True)
class _Rendered:
    """A conversation, or its beginning, by the template."""

    messages: Sequence[Mapping[str, Any]]
    text: str
    token_ids: list[int]
    starts: np.ndarray
    """[tokens] first character of each."""
    generated: list[tuple[int, int]] | None
    """Ranges of tokens in {% generation %} blocks; None of a template without."""


class ChatExamples:
    """Examples by the chat template of one tokenizer folder.

    Args:
        template: of a tokenizer that the Rust library runs.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        tokenizer = template.tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos_id = int(tokenizer.eos_token_id)
        added = tokenizer.added_tokens_decoder.items()
        self._ends = {int(index) for index, token in added if token.special} | {self._eos_id}

    def examples(self, value: Any, record: Mapping[str, Any]) -> list[Example]:
        """The examples of a record, all of whose answers are in one of them.

        Args:
            value: its messages.
            record: all of it; see :func:`~spikingbrain_train.data.conversations.read_conversation`.

        Raises:
            ValueError: they are no conversation, or the template hides where an answer is.
        """
        conversation = read_conversation(value, record, self._template.source(record.get("tools") or None))
        whole = self._rendered(conversation.messages, conversation.tools)
        self._check_all_said(whole, conversation.tools)
        loss = np.zeros(len(whole.token_ids), dtype=bool)
        apart, ids = [], list(whole.token_ids)
        for number in conversation.learnt:
            try:
                start, end = self._answer(whole, conversation, number)
            except _RenderedInAnotherWay:
                apart.append(self._alone(conversation, number))
                continue
            if end > len(ids):  # the template ends the conversation without a token that says so
                ids.append(self._eos_id)
                loss = np.append(loss, False)
            loss[start:end] = True
        loss[0] = False  # nothing comes before the first token to predict it from
        kept = [Example(whole.text, ids, loss)] if loss.any() else []
        return [*apart, *kept]

    def _alone(self, conversation: Conversation, number: int) -> Example:
        """The example of one answer, behind all that was said before it."""
        begun = self._rendered(conversation.messages[: number + 1], conversation.tools)
        start, end = self._answer(begun, conversation, number)
        ids = begun.token_ids + [self._eos_id] * (end - len(begun.token_ids))
        loss = np.zeros(len(ids), dtype=bool)
        loss[max(start, 1) : end] = True
        return Example(begun.text, ids, loss)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> _Rendered:
        text = self._template.apply(messages, tools)
        text.encode()  # half of a surrogate pair is no text, which the tokenizer does not say
        encoded = self._backend.encode(text, add_special_tokens=False)
        generated = None
        if _GENERATION.search(self._template.source(tools)):
            found = self._template.apply(
                messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = np.asarray(found["assistant_masks"], dtype=bool).reshape(-1)
            if len(mask) != len(encoded.ids):
                raise ValueError("transformers splits it into other tokens than the tokenizer alone does")
            edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
            generated = [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
        starts = np.array([start for start, _ in encoded.offsets], dtype=np.int64)
        return _Rendered(messages, text, encoded.ids, starts, generated)

    def _answer(self, rendered: _Rendered, conversation: Conversation, number: int) -> tuple[int, int]:
        """Tokens, as (first, end), of message ``number``; an end behind the last token asks for one more.

        Raises:
            _RenderedInAnotherWay: the answer does not stand in ``rendered`` as it was first written.
            ValueError: the template has no place for its end.
        """
        if rendered.generated is None:
            start, end = self._by_beginnings(rendered, conversation, number)
        else:
            start, end = self._by_blocks(rendered, conversation, number)
        bounds = np.append(rendered.starts, len(rendered.text))
        said = rendered.text[bounds[start] : bounds[end]]
        message = conversation.messages[number]
        texts = [piece for each in texts_of(message) for piece in _THINK.split(each)]
        for text in (*texts, *functions_of(message.get("tool_calls"))):
            if _squeezed(text) not in _squeezed(said):
                raise _RenderedInAnotherWay(
                    f"the chat template leaves out part of the answer in message {number + 1}: {_ADVICE}"
                )
        return start, self._end_of_turn(rendered, start, end, number)

    def _by_blocks(self, rendered: _Rendered, conversation: Conversation, number: int) -> tuple[int, int]:
        """By {% generation %} blocks, one an answer, in their order."""
        assert rendered.generated is not None
        answers = [each for each in conversation.answers if each < len(rendered.messages)]
        if len(rendered.generated) != len(answers):
            raise _RenderedInAnotherWay(
                f"the chat template marks {len(rendered.generated)} stretches with {{% generation %}} where "
                f"the assistant speaks {len(answers)} times: {_ADVICE}"
            )
        return rendered.generated[answers.index(number)]

    def _by_beginnings(self, rendered: _Rendered, conversation: Conversation, number: int) -> tuple[int, int]:
        """By rendering what comes before the answer and up to its end."""
        messages, tools = conversation.messages, conversation.tools
        before = without_prompt = ""
        if number:
            before = self._template.apply(messages[:number], tools, add_generation_prompt=True)
            without_prompt = self._template.apply(messages[:number], tools)
        after = rendered.text
        if number + 1 < len(rendered.messages):
            after = self._template.apply(messages[: number + 1], tools)
        if not (rendered.text.startswith(after) and after.startswith(before)):
            raise _RenderedInAnotherWay(
                f"the chat template gives no beginning of the conversation for message {number + 1} and what "
                "comes before it, and has no {% generation %} blocks, so nothing tells where the answer is: "
                f"{_ADVICE}"
            )
        first = len(before)
        if before == without_prompt:  # the template writes its headers with the messages
            first += _length_of_header(after[first:], messages[number], number)
        start, end = np.searchsorted(rendered.starts, (first, len(after)))
        return int(start), int(end)

    def _end_of_turn(self, rendered: _Rendered, start: int, end: int, number: int) -> int:
        """Where loss ends: behind the token that ends the turn, and before white space that follows it."""
        ids, starts, text = rendered.token_ids, rendered.starts, rendered.text
        last = next((at for at in reversed(range(start, end)) if ids[at] in self._ends), None)
        if last is not None:
            behind = (
                text[starts[last + 1] : starts[end] if end < len(ids) else None] if last + 1 < end else ""
            )
            if not behind.strip():
                return last + 1
        if end == len(ids):
            return end + 1
        if ids[end] in self._ends:
            return end + 1
        raise ValueError(
            f"the chat template writes no special token behind the answer in message {number + 1}, which "
            "would teach the model to stop: put the end-of-sequence token behind answers in chat_template"
        )

    def _check_all_said(self, whole: _Rendered, tools: Any) -> None:
        """Users, systems and tools are heard: a template that knows no such drops them without a word."""
        text = _squeezed(whole.text)
        for name in functions_of(tools):
            if _squeezed(name) not in text:
                raise ValueError(
                    f"the chat template leaves out the function {name!r} of its tools: give a tokenizer "
                    "whose template shows tools, or records without"
                )
        for number, message in enumerate(whole.messages):
            role = message["role"]
            if role == ASSISTANT:
                continue
            is_asked = role in ("system", "developer", "user")
            forms = _as_written if is_asked else _as_written_or_quoted
            is_said = all(any(form in text for form in forms(each)) for each in texts_of(message))
            if not is_said or not (is_asked or self._shows(whole.messages, number, tools)):
                hint = "" if is_asked else ": give a tokenizer whose template shows what tools have answered"
                raise ValueError(
                    f"the chat template leaves out message {number + 1} ({role}) or part of it{hint}"
                )

    def _shows(self, messages: Sequence[Mapping[str, Any]], number: int, tools: Any) -> bool:
        """Whether the template writes that message: what a tool has answered, an answer often repeats."""
        if not isinstance(messages[number].get("content"), str) or not texts_of(messages[number]):
            return True
        marked = [*messages]
        marked[number] = {**messages[number], "content": _MARK}
        try:
            return _MARK in self._template.apply(marked, tools)
        except ValueError:  # a template that reads what tools answer; the text has been found
            return True


class _RenderedInAnotherWay(ValueError):
    """An answer stands in a longer conversation in another form than when it was the last message."""


def _length_of_header(said: str, message: Mapping[str, Any], number: int) -> int:
    """Characters of ``said`` in front of what the message holds, 0 where they are white space alone."""
    pieces = (piece.strip() for text in texts_of(message) for piece in _THINK.split(text))
    first = next((piece for piece in pieces if piece), None)
    at = -1 if first is None else said.find(first)
    if at < 0:
        raise ValueError(
            f"the chat template writes no prompt for an answer, and message {number + 1} has no text to find "
            f"behind its header: {_ADVICE}"
        )
    return at if said[:at].strip() else 0


def _as_written(text: str) -> tuple[str, ...]:
    return (_squeezed(text),)


def _as_written_or_quoted(text: str) -> tuple[str, ...]:
    """Also as JSON: some templates, Llama 3.1's among them, write so what tools have answered."""
    quoted = (json.dumps(text, ensure_ascii=ascii_alone)[1:-1] for ascii_alone in (False, True))
    return (_squeezed(text), *map(_squeezed, quoted))


def _squeezed(text: str) -> str:
    return "".join(text.split())


@lru_cache(maxsize=1)
def chat_examples(folder: str) -> ChatExamples:
    """The examples by the template of ``folder``, which is read once in a process."""
    return ChatExamples(chat_template(folder))
