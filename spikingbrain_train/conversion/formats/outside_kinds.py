"""Kinds that have no keys of their own in config.json: their settings, and the linears that they transform.

``kinds`` holds settings by kind, ``linear_transforms`` says which linears a transform is applied to; both are
for the files that the kinds bring (hf/kinds_spikingbrain.py, hf/linears_spikingbrain.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.kind import OWN_FORMAT, Kind
from spikingbrain_train.architecture.layers import feed_forwards_of, layers, mixers_of, model_weights
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, transforms_of
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.load import read_section
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import Role, beside
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.errors import CheckpointError, ConfigurationError

KINDS_KEY, TRANSFORMS_KEY = "kinds", "linear_transforms"
PACKED_KEY = "packed"
"""Of an entry of ``linear_transforms`` whose linears store what the kind makes of their weights."""

NamesOf = Callable[[Weight, int | None, ModelConfig], list[str]]
"""Names of the tensors that a weight of a layer is made of."""


def kinds_of(model: ModelConfig) -> list[Kind]:
    """Every kind of mixer, feed-forward and linear transform of ``model``, each once."""
    return [*mixers_of(model), *feed_forwards_of(model), *transforms_of(model)]


def without_code(model: ModelConfig) -> list[Kind]:
    """Those that no file of an export in this project's own format computes."""
    lacking: list[Kind] = [kind for kind in _layers_of(model) if OWN_FORMAT not in kind.hf_layers]
    return lacking + [kind for kind in transforms_of(model) if OWN_FORMAT not in kind.hf_formats]


def how_to_bring_code(kinds: Iterable[Kind]) -> str:
    """What to do for kinds without code, as the end of a sentence."""
    classes = [f"{type(kind).__module__}.{type(kind).__qualname__}" for kind in kinds]
    return (
        f"name the file that computes {'it' if len(classes) == 1 else 'each'} in exports in export_module of "
        f"{' and '.join(classes)} (CONTRIBUTING.md, Code for exports)"
    )


def packed_transforms(values: dict[str, Any]) -> list[str]:
    """Names of the linear transforms that a config.json has packed; what is malformed has none."""
    listed = values.get(TRANSFORMS_KEY)
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [str(entry.get("name")) for entry in entries if entry.get(PACKED_KEY)]


def _layers_of(model: ModelConfig) -> list[Any]:
    return [*mixers_of(model), *feed_forwards_of(model)]


def linear_names(model: ModelConfig, names_of: NamesOf) -> dict[Projection, dict[str, int]]:
    """Linears by what they project, and the position of their matrix there.

    Raises:
        CheckpointError: two kinds of layers call what they project differently the same.
    """
    found: dict[Projection, dict[str, int]] = {}
    known: dict[str, tuple[str, int]] = {}
    for _, names, projection in _matrices(model, names_of):
        if projection is None:
            continue
        for name in names:
            if known.setdefault(name, projection) != projection:
                raise CheckpointError(
                    f"linears called {name} in exports are {known[name][0]} in some layers and "
                    f"{projection[0]} in others; give one of them another name in tensor_names of its kind"
                )
        found.setdefault(Projection(projection[0]), {}).update(dict.fromkeys(names, projection[1]))
    return found


def kind_keys(model: ModelConfig, names_of: NamesOf) -> dict[str, Any]:
    """``kinds`` and ``linear_transforms`` of a model; nothing of either that it does not have.

    Raises:
        CheckpointError: linears that are transformed have the name of others, which are not.
    """
    keys: dict[str, Any] = {}
    settings = {
        kind.name: _plain(kind.own_settings(model))
        for kind in kinds_of(model)
        if kind.section is not None and kind.export_module is not None
    }
    if settings:
        keys[KINDS_KEY] = settings
    transforms = linear_transforms(model, names_of)
    if transforms:
        keys[TRANSFORMS_KEY] = transforms
    return keys


def linear_transforms(model: ModelConfig, names_of: NamesOf) -> list[dict[str, Any]]:
    """The key ``linear_transforms``, in the order in which they are applied.

    Raises:
        CheckpointError: as :func:`kind_keys`.
    """
    entries = []
    for kind in transforms_of(model):
        if kind.export_module is None:
            continue  # spikes and INT8 weights have keys of their own
        chosen: dict[str, list[list[str]]] = {}
        left: set[tuple[str, str]] = set()
        for owner, names, projection in _matrices(model, names_of):
            if projection is None or not kind.applies(model, *projection):
                left |= {(owner, name) for name in names}
            elif names not in chosen.setdefault(owner, []):
                chosen[owner].append(names)
        both = left & {(owner, name) for owner, of in chosen.items() for names in of for name in names}
        for owner, name in sorted(both):
            raise CheckpointError(
                f"{kind.name} is applied to some linears that {owner} calls {name} in exports and not to "
                f"others; give one of them another name in tensor_names of its kind"
            )
        entries.append({"name": kind.name, "linears": chosen})
    return entries


def _matrices(
    model: ModelConfig, names_of: NamesOf
) -> Iterator[tuple[str, list[str], tuple[str, int] | None]]:
    """Matrices of layers: the kind that has one, the linears that make it up, and what they project.

    Linears by the end of their names: the last part, or the last two where that is a number.
    """
    found = layers(model)
    for number, weight in model_weights(model):
        if number is None or len(weight.shapes[0]) != 2:
            continue
        layer, names = found[number], []
        branches = {kind.hf_layers[OWN_FORMAT] for kind in layer.mixers}
        for name in names_of(weight, number, model):
            parts = name.removesuffix(".weight").split(".")[3:]  # behind model.layers.<number>
            names.append(".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:]))
        if parts[0] == "mlp":
            owner = layer.feed_forward.hf_layers[OWN_FORMAT]
        else:
            owner = parts[1] if len(branches) > 1 else branches.pop()
        yield owner, names, weight.projection


def read_kinds(keys: ConfigKeys, model: ModelConfig, names_of: NamesOf) -> None:
    """Put what :func:`kind_keys` wrote into ``model``, whose layers are read.

    Raises:
        CheckpointError: a setting that does not fit, or linears that the settings do not ask for.
        ConfigurationError: a kind that is not known here.
    """
    given = keys.values.get(KINDS_KEY) or {}
    transforms = keys.values.get(TRANSFORMS_KEY) or []
    if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
        raise keys.refuse(KINDS_KEY, "must hold the settings of each kind by its name")
    if not isinstance(transforms, list) or not all(isinstance(entry, dict) for entry in transforms):
        raise keys.refuse(TRANSFORMS_KEY, "must list objects with name and linears")
    known: dict[str, Kind] = {
        kind.hf_layers[OWN_FORMAT]: kind for kind in (*MIXERS, *FEED_FORWARDS) if OWN_FORMAT in kind.hf_layers
    }
    known |= {name: LINEAR_TRANSFORMS[name] for entry in transforms if (name := str(entry.get("name")))}
    for name, values in given.items():
        section = known[name].section if name in known else None
        if section is None:
            raise keys.refuse(
                KINDS_KEY, f"has settings of {name}, which no kind here reads; name its package in --plugins"
            )
        try:
            setattr(model, section, read_section(section, values))
        except ConfigurationError as error:
            raise CheckpointError(f"{keys.path}: {KINDS_KEY}: {error}") from error
    if linear_transforms(model, names_of) != transforms:
        raise keys.refuse(TRANSFORMS_KEY, "names other linears than the settings of these kinds ask for")


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON has them, but for those that say how weights begin."""
    values = {}
    for field in dataclasses.fields(settings):
        resume, value = beside(field).resume, getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = _plain(value)
        elif resume is None or resume.role is not Role.start:
            values[field.name] = _json(value)
    return values


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(each) for each in value]
    return value.name if isinstance(value, Enum) else value
