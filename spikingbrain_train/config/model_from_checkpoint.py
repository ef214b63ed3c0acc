"""The model that lies in checkpoint.load, as a choice of the group ``model``.

conf/model/from_checkpoint.yaml names it. Every setting of the schema refers to the stored one, so that what
an experiment or the command line says of a single setting comes on top of it, as with any other choice.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikingbrain_train.config.load import load_model_config, state_of
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint

_RESOLVER = "model_of_checkpoint"
_REFERENCE = f"${{{_RESOLVER}:"
_stored: dict[tuple[str | None, str], DictConfig] = {}
"""What Hydra has been told last, by group and name."""


def _settings(folder: str) -> dict[str, Any]:
    """Every setting of the model in a checkpoint folder, by dotted name."""
    path = latest_checkpoint(folder, "checkpoint.load") / MODEL_CONFIG_FILE
    try:
        state = state_of(path)
    except OSError:  # which reading it puts into a sentence
        return leaves(load_model_config(path))
    return _settings_once(path, state)


# Hydra asks for each of them by itself.
@lru_cache(maxsize=8)
def _settings_once(path: Path, state: Hashable) -> dict[str, Any]:
    return leaves(load_model_config(path))


def _resolve(folder: str | None, setting: str) -> Any:
    if folder is None:
        raise ConfigurationError(
            "model=from_checkpoint takes the architecture from checkpoint.load, which is null; "
            "set checkpoint.load=<folder>, or choose a size such as model=smollm2_135m_hybrid "
            "to start from random weights"
        )
    return _plain(_settings(folder)[setting])


def _plain(value: Any) -> Any:
    """As YAML has it: OmegaConf's lists that are not typed yet hold no enums."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def register_model_from_checkpoint() -> None:
    """Tell Hydra what conf/model/from_checkpoint.yaml refers to. Calling it again changes nothing."""
    OmegaConf.register_new_resolver(_RESOLVER, _resolve, replace=True)
    store_once(_RESOLVER, _references(), group="model")


def store_once(name: str, node: DictConfig, group: str | None = None) -> None:
    """Tell Hydra of a config, unless this very one is what it has been told last.

    Hydra copies it, which takes a tenth of the time of composing a run.
    """
    if _stored.get((group, name)) is not node:
        ConfigStore.instance().store(group=group, name=name, node=node)
        _stored[group, name] = node


def _references() -> DictConfig:
    """A model whose every setting refers to that of checkpoint.load; not to be written to."""
    return _references_of(cast(Hashable, with_sections(ModelConfig)))


@lru_cache(maxsize=2)
def _references_of(schema: Any) -> DictConfig:
    node = OmegaConf.create()
    for name in leaves(schema()):
        OmegaConf.update(node, name, f"{_REFERENCE}${{checkpoint.load}},{name}}}", force_add=True)
    return node


def complete_model(values: DictConfig) -> None:
    """Let what a config does not say of its model be that of checkpoint.load.

    ``--cfg job`` leaves it out where the checkpoint is not there yet.
    """
    model = values.get("model")
    if model is None or (isinstance(model, DictConfig) and "num_layers" not in model):
        OmegaConf.register_new_resolver(_RESOLVER, _resolve, replace=True)
        values.model = OmegaConf.merge(_references(), model or {})


def with_model_of_checkpoint(composed: DictConfig, otherwise: str | None) -> dict[str, Any]:
    """A composed config as plain values, those of the model in checkpoint.load among them.

    Args:
        composed: a run.
        otherwise: what stands for them where there is no such checkpoint; None leaves them out.
    """
    values: Any = OmegaConf.to_container(composed, resolve=False, enum_to_str=True)
    try:
        folder = composed.checkpoint.load
        stored = {} if folder is None else _settings(folder)
    except (SpikingBrainError, OmegaConfBaseException):  # a run would be refused; showing it is not
        stored = {}
    values["model"] = _filled(values["model"], stored, otherwise)
    return values


def _filled(values: dict[str, Any], stored: dict[str, Any], otherwise: str | None) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            inside = _filled(value, stored, otherwise)
            filled |= {name: inside} if inside or not value else {}
        elif isinstance(value, str) and value.startswith(_REFERENCE):
            setting = value.removesuffix("}").rpartition(",")[2]
            if setting in stored:
                filled[name] = _plain(stored[setting])
            elif otherwise is not None:
                filled[name] = otherwise
        else:
            filled[name] = value
    return filled
