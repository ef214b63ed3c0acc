"""What is said beside a setting: which values it takes, and what a run that goes on makes of another one.

A field that is one setting is written ``lr: float = setting(5e-4, above=0, resume=SAID)``. Rules over
several settings of one dataclass stand in its method ``check(self, prefix)``, where ``prefix`` is what
their names begin with: ``optimizer.`` in a run, nothing at the root. They do not stand in
``__post_init__``, because an object does not know under which name it hangs in a run, and because tools and
tests change fields of an object that exists. :func:`check_fields` walks a whole config and applies both.
Rules between sections are those of the rooms that know both (architecture/, planning/).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from spikingbrain_train.config.require import require

_LARGEST = 2**32
"""Whole numbers stay below it: products of two still fit into the 64 bits of an index."""
_KEY = "setting"


class OnChange(Enum):
    """What happens where a setting is not what it was when the checkpoint was written."""

    free = "free"
    """It takes effect; nothing that the run computes depends on it."""
    said = "said"
    """It takes effect, and the run says so."""
    refused = "refused"
    """The run does not start."""
    by_tokens = "by tokens"
    """Refused where it changes which tokens are read next; said where only their path has changed."""


class Role(Enum):
    """What a setting of the model decides."""

    weights = "weights"
    """Which parameters there are, and their shapes: two models that differ in it cannot share weights."""
    function = "function"
    """What is computed with them: another value takes the same weights, but is another model."""
    training = "training"
    """How they are trained, or what the model is declared for: can be tuned while a run goes on."""
    start = "start"
    """How weights begin; without effect where they are read from a checkpoint."""


@dataclass(frozen=True)
class Resuming:
    """The decision about one setting of a run that goes on."""

    rule: OnChange
    note: str = ""
    """Why it is refused, or what to know of a change that is said."""
    role: Role | None = None
    """Of a setting of the model; None elsewhere."""


FREE, SAID, BY_TOKENS = (Resuming(rule) for rule in (OnChange.free, OnChange.said, OnChange.by_tokens))


def said(note: str) -> Resuming:
    """A change takes effect, and the run says so with ``note`` behind it."""
    return Resuming(OnChange.said, note)


def refused(reason: str) -> Resuming:
    """A run with another value does not start."""
    return Resuming(OnChange.refused, reason)


ONLY_AT_THE_START = said("read at the start only")
OTHER_ORDER = "the data would be read in another order"
"""Why a run that goes on refuses what decides it."""

WEIGHTS = Resuming(OnChange.refused, "its weights are those of another architecture", Role.weights)
FUNCTION = Resuming(OnChange.refused, "it would be another model", Role.function)
TRAINING = Resuming(OnChange.said, role=Role.training)
START = Resuming(OnChange.said, ONLY_AT_THE_START.note, Role.start)


@dataclass(frozen=True)
class Setting:
    """What :func:`setting` puts beside a field."""

    resume: Resuming | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    must: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Hold the number ``value`` of the setting ``name`` to its bounds. Raises ConfigurationError."""
        for bound, fits, words in (
            (self.minimum, lambda bound: value >= bound, f"be at least {self.minimum}"),
            (self.above, lambda bound: value > bound, f"be greater than {self.above}"),
            (self.maximum, lambda bound: value <= bound, f"be at most {self.maximum}"),
            (self.below, lambda bound: value < bound, f"be below {self.below}"),
        ):
            if bound is not None:
                require(fits(bound), f"{name}={value} must {self.must or words}")

    def bounds(self) -> str:
        """Its bounds in words, ``at least 0, below 1``; empty where it has none."""
        if self.must is not None:
            return self.must.removeprefix("be ")
        words = (("at least", self.minimum), ("greater than", self.above), ("at most", self.maximum))
        found = [f"{word} {bound}" for word, bound in (*words, ("below", self.below)) if bound is not None]
        return ", ".join(found)


def beside(field: dataclasses.Field[Any]) -> Setting:
    """What is said beside a field."""
    return field.metadata.get(_KEY, Setting())


def setting(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Callable[[], Any] | None = None,
    resume: Resuming | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    must: str | None = None,
) -> Any:
    """A dataclass field that is one setting.

    Args:
        default: its value where nothing else is said; omegaconf's MISSING has to be said.
        default_factory: makes the default of a list.
        resume: what a run that goes on does with another value. Every setting of a run has a decision; a
            setting of something else, such as a conversion, has none.
        minimum, above, maximum, below: bounds of a number, or of each number of a list; null passes.
        must: how the sentence of a refusal ends, instead of naming the bound: "be between 0 (off) and 1".
    """
    metadata = {_KEY: Setting(resume, minimum, above, maximum, below, must)}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, Setting, Any]]:
    """Every single setting below a config object: dotted name, what is said beside it, value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", beside(field), value


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every single setting below a config object by its dotted name, in the order of the fields."""
    return {name: value for name, _, value in _fields(config, prefix)}


def decisions(config: Any, prefix: str = "") -> dict[str, Resuming]:
    """What resuming does with a change of each setting below a config object, by dotted name.

    Raises:
        TypeError: a setting has no decision; it needs ``setting(..., resume=...)``.
    """
    found = {name: entry.resume for name, entry, _ in _fields(config, prefix)}
    for name, decision in found.items():
        if decision is None:
            raise TypeError(f"{name} does not say what resuming does with a change: setting(..., resume=...)")
    return {name: decision for name, decision in found.items() if decision is not None}


def _single_values(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _single_values(item)
    else:
        yield value


def _check_value(name: str, value: Any) -> None:
    """What holds for every number and text, whatever it is for."""
    if isinstance(value, float):
        require(math.isfinite(value), f"{name}={value} must be a finite number")
    elif isinstance(value, int):  # truth values are small ones
        require(abs(value) < _LARGEST, f"{name}={value} is too large; it must be below 2**32 = {_LARGEST}")
    elif type(value) is str:
        require(
            value.strip() != "" and "\0" not in value,
            f"{name} must not be empty; give it a value, or leave it out",
        )


def check_fields(config: Any, prefix: str = "") -> None:
    """Hold every setting below a config object to what is said beside it, and every section to its ``check``.

    Args:
        config: a config dataclass whose settings all have values.
        prefix: what its names begin with: ``model.`` for the model of a run, nothing for a run.

    Raises:
        ConfigurationError: names the setting and says what would be valid.
    """
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{name}.")
            continue
        limits = beside(field)
        for single in _single_values(value):
            _check_value(name, single)
            if single is not None:
                limits.check(name, single)
    if hasattr(config, "check"):
        config.check(prefix)
