"""From YAML or Hydra's composed config to typed objects, and back to YAML beside a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.earlier_releases import translate_model, translate_run
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.plugins import load_plugins, plugins_of
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.schema import check_lists, explain, unknown_setting, unknown_settings
from spikingbrain_train.config.sections import structured, with_sections
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.config.yaml_files import conf_folder, read_composed, read_yaml, yaml_of
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.storage.durable_files import write_text_durably

Config = TypeVar("Config", RunConfig, ModelConfig, ConversionConfig)


def _to_typed(values: DictConfig | ListConfig, schema: type[Config]) -> Config:
    """Check ``values`` against ``schema``, resolve interpolations, and build the object.

    Raises:
        ConfigurationError: an unknown setting, a value of the wrong kind, or a setting without value.
    """
    schema = with_sections(schema)
    try:
        unknown = unknown_settings(values, schema) if isinstance(values, DictConfig) else []
        if unknown:
            is_group = isinstance(OmegaConf.select(values, unknown[0]), DictConfig)
            raise unknown_setting(unknown[0], schema, may_be_a_plugins=is_group)
        config = OmegaConf.merge(structured(schema), values)
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            verb = "has no value" if len(missing) == 1 else "have no value"
            raise ConfigurationError(f"{', '.join(missing)} {verb}; set {missing[0]}=... and the like")
        typed = cast(Config, OmegaConf.to_object(config))
        check_lists(typed)
        return typed
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        explained = explain(error, schema)
        if explained is None:
            raise
        raise explained from error


def to_run_config(composed: DictConfig) -> RunConfig:
    """The typed run of a composed config. A dry run needs no output_dir: it gets the current folder, unused.

    Raises:
        ConfigurationError: see :func:`_to_typed`.
        CheckpointError: ``model=from_checkpoint`` and checkpoint.load is not a checkpoint folder.
    """
    if OmegaConf.is_missing(composed, "output_dir") and composed.get("dry_run"):
        composed = composed.copy()
        composed.output_dir = "."
    return _to_typed(composed, RunConfig)


def _load(path: str | Path, schema: type[Config]) -> Config:
    """Read a config, or copy what was read last time where neither the file nor the schema is another."""
    try:
        state = state_of(path)
    except OSError:
        return _read(path, schema)
    classes: tuple[Any, ...] = (schema, with_sections(schema))
    return deepcopy(_read_once(str(path), state, classes))


def state_of(path: str | Path) -> tuple[int, int, int]:
    """What tells a file from one that lay or lies at the same path. Raises OSError where there is none."""
    found = Path(path).stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


# A start asks many times, of plan, checks, weights, data and log, and one reading takes a tenth of a second.
@lru_cache(maxsize=8)
def _read_once(path: str, state: Hashable, classes: tuple[Any, ...]) -> Any:
    return _read(path, classes[0])


def _read(
    path: str | Path, schema: type[Config], complete: Callable[[DictConfig], None] | None = None
) -> Config:
    try:
        values = read_yaml(Path(path))
        (translate_run if schema is RunConfig else translate_model)(values)
        if complete is not None:
            complete(values)
        return _to_typed(values, schema)
    except ConfigurationError as error:
        sentence = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise CheckpointError(sentence) from error


def read_section(name: str, values: dict[str, Any]) -> Any:
    """The settings ``name`` of a model, as a checkpoint of another form writes them: plain values by name.

    Raises:
        ConfigurationError: an unknown setting, or a value that does not fit.
    """
    schema = with_sections(ModelConfig)
    try:
        given = OmegaConf.create({name: values})
        if unknown := unknown_settings(given, schema):
            raise unknown_setting(unknown[0], schema)
        merged = OmegaConf.merge(structured(schema), given)
        typed = OmegaConf.to_object(OmegaConf.select(merged, name))
        check_lists(typed, f"{name}.")
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        explained = explain(error, schema)
        if explained is None:
            raise
        raise explained from error
    check_fields(typed, f"{name}.")
    return typed


def load_model_config(path: str | Path) -> ModelConfig:
    """Read a checkpoint's ``model_config.yaml``. Raises CheckpointError, naming the file."""
    return _load(path, ModelConfig)


def load_run_config(path: str | Path, complete: Callable[[DictConfig], None] | None = None) -> RunConfig:
    """Read a checkpoint's ``run_config.yaml``.

    Args:
        path: the file.
        complete: adds to its values what it leaves out.

    Raises:
        CheckpointError: it cannot be read or is no config; the sentence names it.
    """
    return _load(path, RunConfig) if complete is None else _read(path, RunConfig, complete)


def save_config(config: RunConfig | ModelConfig | ConversionConfig, path: str | Path) -> None:
    """Write a config as YAML that :func:`load_run_config` and its siblings read back to an equal object.

    The file appears whole or not at all, also after a power loss.
    """
    write_text_durably(Path(path), yaml_of(asdict(config)))


def load_conversion(name_or_path: str, overrides: list[str] | None = None) -> ConversionConfig:
    """The recipe ``conf/conversion/<name>.yaml``, or any YAML file, with ``name=value`` overrides on top.

    Both may be composed of others, which their ``defaults`` name (config/yaml_files.py).

    Raises:
        ConfigurationError: no such recipe, an override that is not ``name=value``, or one that does not fit.
    """
    recipes = conf_folder() / "conversion"
    path = (
        Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else recipes / f"{name_or_path}.yaml"
    )
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
        raise ConfigurationError(
            f"there is no conversion {name_or_path}; choose one of {known}, or name a .yaml file"
        )
    values = read_composed(path, "conversion")
    for override in overrides or []:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"the override {override!r} is not name=value, e.g. sliding_window=2048")
        try:
            OmegaConf.update(values, name, yaml.safe_load(value), force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigurationError(f"the override {override!r} cannot be read; write name=value") from error
    load_plugins(plugins_of(values, f"the recipe {path}"))
    return _to_typed(values, ConversionConfig)
