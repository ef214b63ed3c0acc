"""Answers questions of probes from their text alone, knowing nothing of how it was made."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PASS_KEY = re.compile(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.")
_ASKED = re.compile(r"What is the special magic (?:number|uuid) for (\S+) mentioned")
_ASSIGNMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR )?(\w+)")
_VALUE = re.compile(r"assigned the value (\d+) in the text above")


def pass_key(prompt: str) -> list[str]:
    """The key that the prompt names, twice and in one place."""
    ((first, again),) = _PASS_KEY.findall(prompt)
    assert first == again
    return [first]


def needle(prompt: str) -> list[str]:
    """The value of the key that is asked for, which stands there once."""
    (key,) = _ASKED.findall(prompt)
    return re.findall(rf"One of the special magic (?:number|uuid)s for {key} is: (\S+)\.", prompt)


def chain(prompt: str) -> list[str]:
    """The variables that hold the value of the last question, in the order of their assignment."""
    value = _VALUE.findall(prompt)[-1]
    holds = {value}
    found = []
    for name, source in _ASSIGNMENT.findall(prompt):
        if source in holds:
            holds.add(name)
            found.append(name)
    return found


def pairs(context: Sequence[int], continuation: Sequence[int], starts: Sequence[int]) -> list[int]:
    """What stood behind each key, and one token between them, where the key stood first."""
    text = [*context, *continuation]
    return [text[text.index(text[len(context) + start - 2]) + 2] for start in starts]
