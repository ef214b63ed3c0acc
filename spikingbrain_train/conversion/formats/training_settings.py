"""Settings of training in config.json: no modelling code reads them, and the way back gives them again.

Losses of routers, the capacity of experts, drop-out of branches: whatever a model's layers have and
:class:`~spikingbrain_train.config.setting.Role` calls training. Which parts of it a run trains, a list, is
that run's alone.
"""

from __future__ import annotations

from typing import Any

from spikingbrain_train.architecture.same_architecture import roles, settings_in_use
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.setting import Role, check_fields, leaves
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.errors import CheckpointError, ConfigurationError

_SECTIONS = ("moe.", "parallel_hybrid.")
"""What stands elsewhere has keys of its own: k of spikes, positions that a model is declared for."""


def training_settings(model: ModelConfig) -> dict[str, Any]:
    """Those that ``model`` uses, by dotted name."""
    used = settings_in_use(model)
    return {name: used[name] for name in _names() if name in used}


def read_training_settings(keys: ConfigKeys, model: ModelConfig) -> None:
    """Put what :func:`training_settings` wrote into ``model``.

    Args:
        keys: they and nothing else.
        model: whose layers are read.

    Raises:
        CheckpointError: a setting that is unknown, or that cannot have this value.
    """
    defaults = leaves(model)
    for name, value in keys.values.items():
        if name not in _names():
            raise keys.refuse(name, f"is no setting of training; there are {', '.join(_names())}")
        if isinstance(defaults[name], bool):
            value = keys.boolean(name, False)
        elif isinstance(defaults[name], int):
            value = keys.integer(name, minimum=0)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = float(value)
        elif value is not None or defaults[name] is not None:
            raise keys.refuse(name, "must be a number")
        section, field = name.split(".")
        setattr(getattr(model, section), field, value)
    try:
        for section in _SECTIONS:
            check_fields(getattr(model, section[:-1]), section)
    except ConfigurationError as error:
        raise CheckpointError(f"{keys.path}: {error}") from error


def _names() -> list[str]:
    defaults = leaves(ModelConfig())
    return [
        name
        for name, role in roles().items()
        if role is Role.training and name.startswith(_SECTIONS) and not isinstance(defaults[name], list)
    ]
