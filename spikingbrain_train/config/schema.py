"""What the dataclasses allow, in words: names, what each takes, the sentence for what does not fit."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from spikingbrain_train.config.earlier_releases import MOVED_SETTINGS, RENAMED_VALUES
from spikingbrain_train.config.fp8 import NO_RECIPES, Fp8Recipe
from spikingbrain_train.config.linear_transforms import NO_PROJECTIONS, Projection
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError

Schema = type[Any]
"""A dataclass that describes a config, such as RunConfig."""


def _annotations(schema: Schema) -> dict[str, Any]:
    """Types of a dataclass's fields: text that is evaluated once, of hundreds of times that a start asks."""
    return _evaluated(typing.cast(Hashable, schema))


@functools.cache
def _evaluated(schema: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def setting_types(schema: Schema, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting below ``schema`` as (dotted name, annotated type), groups of settings included."""
    annotations = _annotations(schema)
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        yield name, annotations[field.name]
        if dataclasses.is_dataclass(annotations[field.name]):
            yield from setting_types(annotations[field.name], f"{name}.")


def without_none(annotation: Any) -> tuple[Any, bool]:
    """``X | None`` as (X, True); anything else as (annotation, False)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return members[0], len(members) < len(typing.get_args(annotation))
    return annotation, False


def what_it_takes(annotation: Any) -> str:
    """The values of a setting in words: "a whole number", "one of fp32, bf16", "a list of ... or null"."""
    annotation, optional = without_none(annotation)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        annotation, "a value"
    )
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        words = "one of " + ", ".join(member.name for member in annotation)
    elif dataclasses.is_dataclass(annotation):
        words = "a group of settings: " + ", ".join(field.name for field in dataclasses.fields(annotation))
    elif typing.get_origin(annotation) is list:
        (item,) = typing.get_args(annotation)
        words = "a list [a,b,...]" + (f", each {what_it_takes(item)}" if item is not Any else "")
    return f"{words}, or null" if optional else words


def unknown_setting(name: str, schema: Schema, *, may_be_a_plugins: bool = False) -> ConfigurationError:
    """The error for a setting that ``schema`` does not have, with the nearest that it has.

    Args:
        name: of the setting.
        schema: of the config.
        may_be_a_plugins: whether it may be the section of a plugin that nobody has named.
    """
    if name in MOVED_SETTINGS:
        return ConfigurationError(f"{name} is not a setting any more; write {MOVED_SETTINGS[name]}")
    settings = dict(setting_types(schema))
    parent, _, leaf = name.rpartition(".")
    leaves = {known.rpartition(".")[2]: known for known in settings}
    siblings = [known for known in settings if known.rpartition(".")[0] == parent]
    guess = (
        [leaves[leaf]]
        if leaf in leaves
        else difflib.get_close_matches(name, siblings, n=1, cutoff=0.85)
        or difflib.get_close_matches(name, settings, n=1, cutoff=0.85)
        or [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    )
    hint = f"; did you mean {guess[0]}?" if guess else ""
    annotation = settings.get(parent)
    if annotation is not None and dataclasses.is_dataclass(annotation):
        valid = f"{parent} has " + ", ".join(field.name for field in dataclasses.fields(annotation))
    else:
        valid = "there are " + ", ".join(field.name for field in dataclasses.fields(schema))
    if may_be_a_plugins and not guess:
        valid += "; if a plugin brings it, name its package in plugins=[package.module] (--plugins of a tool)"
    return ConfigurationError(f"{name} is not a setting{hint or ';'} {valid}")


_MISTAKEN: dict[Any, Mapping[str, str]] = {Projection: NO_PROJECTIONS, Fp8Recipe: NO_RECIPES}
"""What somebody may take for a value of a setting -> why it is none."""


def _wrong_value(name: str, message: str, schema: Schema) -> ConfigurationError:
    """The error for a value of the wrong kind; ``message`` is OmegaConf's."""
    settings = dict(setting_types(schema))
    annotation = settings.get(re.sub(r"\[\d+\]", "", name))
    if annotation is not None and name.endswith("]"):
        annotation = typing.get_args(without_none(annotation)[0])[0]
    if annotation is None:
        return ConfigurationError(f"{name}: {message}")
    quoted = re.search(r"[Vv]alue '(.*?)'|value: (\S+)|field '.*' is not (Optional)", message, re.DOTALL)
    found = next((group for group in quoted.groups() if group), "") if quoted else ""
    found = "null" if found == "Optional" else found
    hint = ""
    kind = without_none(annotation)[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        named = {member.name.lower(): member.name for member in kind}
        near = difflib.get_close_matches(found.lower(), named, n=1)
        hint = f"; did you mean {named[near[0]]}?" if near else ""
        if found in _MISTAKEN.get(kind, {}):
            hint = f"; {_MISTAKEN[kind][found]}"
        if found in RENAMED_VALUES.get(name, {}):
            hint = f"; {found} is called {RENAMED_VALUES[name][found]} now"
    shown = f"{name}={found}" if found else name
    return ConfigurationError(f"{shown} does not fit: {name} takes {what_it_takes(annotation)}{hint}")


def explain(error: BaseException, schema: Schema) -> SpikingBrainError | None:
    """The sentence for OmegaConf's error over a config of type ``schema``, None for a foreign error."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, SpikingBrainError):
            return link
    for link in chain:
        if not isinstance(link, OmegaConfBaseException):
            continue
        name, message = str(link.full_key or ""), str(link).splitlines()[0]
        if isinstance(link, InterpolationResolutionError):
            where = f"{name} refers" if name else "a ${...} in the config refers"
            return ConfigurationError(f"{where} to something that is not there: {message}")
        if not name or name.split(".")[0] == "hydra":
            return ConfigurationError(f"{name}: {message}" if name else message)
        if isinstance(link, (ConfigKeyError, ConfigAttributeError)):
            return unknown_setting(name, schema, may_be_a_plugins=name.rpartition(".")[0] == "model")
        if isinstance(link, MissingMandatoryValue):
            return ConfigurationError(f"{name} has no value; set it with {name}=...")
        return _wrong_value(name, message, schema)
    return None


def unknown_settings(config: Any, schema: Schema) -> list[str]:
    """Dotted names in an OmegaConf ``config`` that ``schema`` does not have, in the order they appear."""
    settings = dict(setting_types(schema))

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            name = f"{prefix}{key}"
            if name not in settings:
                yield name
            elif dataclasses.is_dataclass(settings[name]) and OmegaConf.is_dict(node._get_node(key)):
                yield from walk(node._get_node(key), f"{name}.")

    return list(walk(config, ""))


def check_lists(config: Any, prefix: str = "") -> None:
    """Lists hold single values of their type: OmegaConf lets a list in a list pass.

    Raises:
        ConfigurationError: naming the setting and the index.
    """
    annotations = _annotations(type(config))
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_lists(value, f"{name}.")
        elif isinstance(value, list):
            (item_type,) = typing.get_args(without_none(annotations[field.name])[0])
            if item_type is Any:  # its section says what it takes
                continue
            for index, item in enumerate(value):
                if item_type is not Any and not isinstance(item, item_type):
                    element = f"{name}[{index}]"
                    takes = what_it_takes(item_type)
                    raise ConfigurationError(f"{element}={item} does not fit: {element} takes {takes}")
