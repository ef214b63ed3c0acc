"""One document as a file holds it, and what becomes of it: text, examples of a conversation, a domain."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import orjson

from spikingbrain_train.data.chat import CHAT_KEYS
from spikingbrain_train.errors import DataError

_Made = TypeVar("_Made")


class EmptyDocumentError(DataError):
    """A document holds no text."""


@dataclass(frozen=True)
class RawDocument:
    """One document before decoding."""

    origin: str
    """File and line (``docs.jsonl:17``), for error messages."""
    payload: bytes
    """The line, or the whole text."""
    is_json: bool
    """Whether the payload is a JSON object that holds the text."""
    position: int
    """Bytes of the source file (as stored, so compressed ones where it is compressed) read up to here."""
    piece: int | None = None
    """Its number, from 1, among the documents that one text file was cut into; None for a whole one."""
    file: str = ""
    """Path of the file that it lies in, as given, or ``pydoc-topics``."""

    def text(self, text_key: str, render: Callable[[Any], str] | None = None) -> str:
        """The document's text, which is never empty and always encodable as UTF-8.

        Args:
            text_key: field of a JSON document that holds the text.
            render: makes text of what the field holds; raises ValueError where that cannot be. None takes a
                field that is text.

        Raises:
            DataError: names :attr:`origin` and says what is wrong there.
        """
        text = self._plain_field(text_key) if self.is_json and render is None else None
        if text is None:
            text = self._field(text_key, render) if self.is_json else self._decoded
        if not text or text.isspace():
            raise EmptyDocumentError(f"{self.origin}: the document is empty: remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._unpaired_surrogate() from error
        return text

    def examples(self, chat_key: str, make: Callable[[Any, dict[str, Any]], list[_Made]]) -> list[_Made]:
        """What ``make`` makes of the conversation in a JSON document.

        Args:
            chat_key: the field that holds it.
            make: takes what the field holds, and all of the document; raises ValueError where that cannot be.

        Raises:
            DataError: names :attr:`origin` and says what is wrong there.
        """
        if not self.is_json:
            raise DataError(
                f"{self.origin}: a text file holds no conversation: give .jsonl files for --loss-on assistant"
            )
        value = self._value(chat_key, "--chat-key")
        try:
            return make(value, self._record)
        except UnicodeEncodeError as error:
            raise self._unpaired_surrogate() from error
        except ValueError as error:
            raise self._no_conversation(chat_key, error) from error

    def label(self, key: str) -> str:
        """What the JSON document holds under ``key``, a short text or a whole number, as text.

        Args:
            key: a field, or one inside others: ``meta.source``.

        Raises:
            DataError: there is no such field, or something else in it.
        """
        value: Any = self._record
        for name in [key] if key in self._record else key.split("."):
            if not isinstance(value, dict) or name not in value:
                fields = ", ".join(sorted(self._record)[:8]) or "none"
                raise DataError(
                    f"{self.origin}: no field {key!r} (fields: {fields}): name another with --domain-key, or "
                    "take --domain-from file"
                )
            value = value[name]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise DataError(
                f"{self.origin}: the field {key!r} names no domain, which is a text or a whole number: name "
                "another with --domain-key"
            )
        return str(value)

    @cached_property
    def _decoded(self) -> str:
        try:
            return self.payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.origin}: not valid UTF-8 (byte {error.start}): convert the file to UTF-8"
            ) from error

    @cached_property
    def _record(self) -> dict[str, Any]:
        """The JSON object of the line."""
        line = self._decoded
        if not line or line.isspace():
            raise EmptyDocumentError(
                f"{self.origin}: the line is empty: remove it, every line holds one JSON object"
            )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            raise DataError(f"{self.origin}: not a JSON object ({reason}): every line holds one") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self.origin}: a JSON {type(record).__name__} instead of an object: every line holds one "
                "object"
            )
        return record

    def _unpaired_surrogate(self) -> DataError:
        # JSON can spell half of a surrogate pair, which is no character and which tokenizers reject.
        return DataError(
            f"{self.origin}: the text contains an unpaired surrogate: repair or remove the document"
        )

    def _no_conversation(self, chat_key: str, error: ValueError) -> DataError:
        return DataError(
            f"{self.origin}: the field {chat_key!r} is no conversation ({error}): repair or remove the "
            "document, or name another field with --chat-key"
        )

    def _value(self, key: str, flag: str) -> Any:
        """What the JSON document holds under ``key``, which ``flag`` names."""
        record = self._record
        if key not in record:
            fields = ", ".join(sorted(record)[:8]) or "none"
            raise DataError(
                f"{self.origin}: no field {key!r} (fields: {fields}): {_advice(record, key, flag)}"
            )
        return record[key]

    def _plain_field(self, key: str) -> str | None:
        """The text under ``key``, in a third of the time; None where the line needs a closer look."""
        try:
            record = orjson.loads(self.payload)
        except ValueError:
            return None
        value = record.get(key) if isinstance(record, dict) else None
        return value if isinstance(value, str) else None

    def _field(self, text_key: str, render: Callable[[Any], str] | None) -> str:
        flag = "--text-key" if render is None else "--chat-key"
        value = self._value(text_key, flag)
        if render is not None:
            try:
                return render(value)
            except ValueError as error:
                raise self._no_conversation(text_key, error) from error
        if not isinstance(value, str):
            advice = _advice(self._record, text_key, flag)
            raise DataError(f"{self.origin}: the field {text_key!r} is not a string: {advice}")
        return value


def _advice(record: dict[str, Any], text_key: str, flag: str) -> str:
    """What to do about a record without text, or without a conversation, under ``text_key``."""
    likely = [text_key, *CHAT_KEYS] if flag == "--text-key" else CHAT_KEYS
    chat = next((key for key in likely if isinstance(record.get(key), list)), None)
    if chat is not None:
        return f"--chat-key {chat} renders its messages with the tokenizer's chat template"
    return "name the text with --text-key" if flag == "--text-key" else "name the messages with --chat-key"
