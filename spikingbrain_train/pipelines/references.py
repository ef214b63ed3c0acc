"""``${name}`` and ``${steps.<step>.<output>}`` in the settings of a pipeline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from spikingbrain_train.errors import ConfigurationError

_REFERENCE = re.compile(r"\$\{\s*([^{}]*?)\s*\}")
_STEPS = "steps."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean align?``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def references(value: Any) -> Iterator[str]:
    """Every name that ``value`` refers to, at any depth, in its order."""
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from references(item)


def step_of(reference: str) -> tuple[str, str] | None:
    """(step, output) of ``steps.align.checkpoint``; None where no step is referred to."""
    if not reference.startswith(_STEPS):
        return None
    step, _, output = reference.removeprefix(_STEPS).partition(".")
    return step, output


def resolve(value: Any, look_up: Callable[[str], Any]) -> Any:
    """``value`` with every reference replaced by what ``look_up`` says.

    A text that is nothing but a reference becomes the value, of whatever type. A list takes the place of its
    reference in a list item by item, null is left out there. What is looked up is not searched again.
    """
    if isinstance(value, str):
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return look_up(whole[1])
        return _REFERENCE.sub(lambda match: _text(look_up(match[1])), value)
    if isinstance(value, Mapping):
        return {key: resolve(item, look_up) for key, item in value.items()}
    if isinstance(value, Sequence):
        items = []
        for item in value:
            resolved = resolve(item, look_up)
            if isinstance(item, str) and isinstance(resolved, list):
                items += resolved
            elif resolved is not None or item is None:
                items.append(resolved)
        return items
    return value


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def in_order(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """The names of ``needs`` with each behind what it needs, else in the order they have.

    Raises:
        ConfigurationError: names that need each other.
    """
    done: dict[str, None] = {}
    entered: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in done:
            return
        if name in entered:
            circle = [*list(entered)[list(entered).index(name) :], name]
            raise ConfigurationError(f"these steps wait for each other: {' -> '.join(circle)}")
        entered[name] = None
        for needed in needs[name]:
            visit(needed)
        del entered[name]
        done[name] = None

    for name in needs:
        visit(name)
    return list(done)
