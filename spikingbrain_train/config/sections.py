"""Settings of kinds that plugins bring: sections that a model and a conversion have beside their own.

A kind from outside registers a dataclass for its settings; from then on ``model.<section>.<setting>`` is as
much a part of the schema as ``model.gla.gate``: composed, checked, stored, compared on resuming.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from copy import deepcopy
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.import_path import import_path_of
from spikingbrain_train.config.model import DecoderConfig, LayersConfig, ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import decisions
from spikingbrain_train.errors import ConfigurationError

Config = TypeVar("Config", RunConfig, ModelConfig, ConversionConfig)

_sections: dict[str, type] = {}


def add_section(name: str, settings: type) -> None:
    """Let models and conversions have settings of a kind.

    Args:
        name: the section's name, a Python identifier.
        settings: a dataclass whose fields all have defaults, written with ``config.setting.setting``.

    Raises:
        ConfigurationError: the name is taken or is no identifier, or the dataclass is not as it has to be.
    """
    own = {field.name for schema in (ModelConfig, ConversionConfig) for field in dataclasses.fields(schema)}
    known, path = _sections.get(name), import_path_of(settings)
    if name in own or (known is not None and import_path_of(known) != path):
        raise ConfigurationError(
            f"a plugin calls its settings {name}, as a model's are called already; give them another name"
        )
    require(name.isidentifier(), f"a plugin calls its settings {name!r}, which is no Python identifier")
    require(
        dataclasses.is_dataclass(settings),
        f"a plugin's settings {name} are of {path}, which is no dataclass; decorate it with @dataclass",
    )
    try:
        decisions(settings(), f"{name}.")
    except TypeError as error:  # a field without a default, or without a decision
        raise ConfigurationError(
            f"a plugin's settings {name} are of {path}, whose fields need setting(default, resume=...) each: "
            f"{error}"
        ) from error
    _sections[name] = settings


def with_sections(schema: type[Config]) -> type[Config]:
    """``schema`` with the sections of all kinds that are registered; itself while there are none."""
    return cast(type[Config], _extended(cast(Hashable, schema), tuple(_sections.items())))


def structured(schema: type[Config]) -> DictConfig:
    """A schema as OmegaConf checks values by it, to be merged or copied and not to be written to.

    Making one takes longer than all else that reading a config does.
    """
    return _structured(cast(Hashable, schema))


def section_of(config: LayersConfig, name: str) -> Any:
    """The settings ``name`` of a model or conversion; defaults where it was made before their kind was."""
    return getattr(config, name, None) or _sections[name]()


def with_layers(source: ModelConfig, recipe: ConversionConfig) -> ModelConfig:
    """A model of the source's sizes with a recipe's layers, sections of plugins and activation among them."""
    sizes = {field.name: getattr(source, field.name) for field in dataclasses.fields(DecoderConfig)}
    layers = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(LayersConfig)}
    own = {name: section_of(recipe, name) for name in _sections}
    asked = {
        name: value
        for name in ("activation_func", "fatrelu_threshold", "attn_sub_norm", "ffn_sub_norm")
        if (value := getattr(recipe, name)) is not None
    }
    return with_sections(ModelConfig)(**deepcopy(sizes | layers | own | asked))


@functools.cache
def _structured(schema: Any) -> DictConfig:
    return cast(DictConfig, OmegaConf.structured(schema))


@functools.cache
def _extended(schema: Any, sections: tuple[tuple[str, type], ...]) -> type:
    if not sections:
        return schema
    if issubclass(schema, RunConfig):
        model = _extended(ModelConfig, sections)
        fields: list[Any] = [("model", model, dataclasses.field(default_factory=model))]
    else:
        fields = [(name, type_, dataclasses.field(default_factory=type_)) for name, type_ in sections]
    return dataclasses.make_dataclass(
        schema.__name__, fields, bases=(schema,), namespace={"__reduce__": _reduce, "__doc__": schema.__doc__}
    )


def _reduce(config: Any) -> tuple[Any, ...]:
    """Pickle by what it is made from: no module holds the class."""
    base = type(config).__bases__[0]
    sections = tuple(
        (name, type(value)) for name, value in vars(_layers(config)).items() if name in _sections
    )
    return _rebuild, (base, sections, vars(config))


def _layers(config: Any) -> Any:
    return config.model if isinstance(config, RunConfig) else config


def _rebuild(base: type, sections: tuple[tuple[str, type], ...], values: dict[str, Any]) -> Any:
    for name, settings in sections:
        add_section(name, settings)
    return _extended(base, sections)(**values)
