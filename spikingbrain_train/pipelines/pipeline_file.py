"""A pipeline as its YAML file tells it, with what the command line changes. Nothing is looked up yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.references import did_you_mean, references, step_of

FOLDER = "pipeline"
"""Of conf/."""
CHECKOUT = "checkout"
"""A variable that every pipeline in a checkout of the project has: its folder."""
_MISSING = "???"
_PARTS = ("output", "variables", "plugins", "when_changed", "show", "steps")


class WhenChanged(str, Enum):
    """What happens to the result of a step that has to be done anew."""

    set_aside = "set_aside"
    """It is renamed to ``<name>.superseded`` and stays."""
    remove = "remove"


@dataclass(frozen=True)
class PipelineFile:
    """The content of a pipeline's YAML."""

    path: str
    variables: Mapping[str, Any]
    """``output``, the folder of the pipeline, and what a user may give as ``name=value``."""
    steps: Mapping[str, Mapping[str, Any]]
    """Name -> settings, ``kind`` among them, with references in them."""
    plugins: Sequence[str] = ()
    """Modules that register kinds of steps."""
    when_changed: WhenChanged = WhenChanged.set_aside
    show: str | None = None
    """A text file whose content is printed at the end; may be a reference."""

    def missing(self) -> list[str]:
        """Variables that have to be given and are not."""
        return [name for name, value in self.variables.items() if value == _MISSING]


def checkout() -> Path | None:
    """The folder of the project, None where it is installed as a package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "train.py").is_file() and (root / "pyproject.toml").is_file() else None


def load_pipeline(
    name_or_path: str, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> PipelineFile:
    """Read a pipeline.

    Args:
        name_or_path: a YAML file, or the name of one in conf/pipeline.
        overrides: ``name=value`` with the name of a variable, ``output``, or ``steps.<step>.<setting>``; the
            value is YAML.
        values: variables that are taken as they are.

    Raises:
        ConfigurationError: naming the file, and the step where there is one.
    """
    path = _find(name_or_path)
    content = _read(path)
    for part in content:
        if part not in _PARTS:
            hint = did_you_mean(part, _PARTS)
            raise ConfigurationError(
                f"{path}: {part} is not a part of a pipeline{hint or ';'} there are {', '.join(_PARTS)}"
            )
    steps = _mapping(path, "steps", content.get("steps"))
    if not steps:
        raise ConfigurationError(f"{path}: steps is empty; give at least one step")
    for name, settings in steps.items():
        _mapping(path, f"step {name}", settings)
    variables = {
        "output": content.get("output", _MISSING),
        **_mapping(path, "variables", content.get("variables") or {}),
    }
    if CHECKOUT in variables:
        raise ConfigurationError(f"{path}: the variable {CHECKOUT} has a meaning; choose another name")
    for override in overrides:
        _override(path, variables, steps, override)
    for name, value in (values or {}).items():
        variables[name] = value
    for name, value in variables.items():
        if any(step_of(reference) for reference in references(value)):
            raise ConfigurationError(f"{path}: {name} refers to a step; only steps can do that")
    plugins = content.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise ConfigurationError(f"{path}: plugins must be a list of modules, e.g. [my_package.my_steps]")
    when_changed = content.get("when_changed", WhenChanged.set_aside.value)
    if when_changed not in [choice.value for choice in WhenChanged]:
        choices = " or ".join(choice.value for choice in WhenChanged)
        raise ConfigurationError(f"{path}: when_changed={when_changed} does not fit; it takes {choices}")
    return PipelineFile(str(path), variables, steps, plugins, WhenChanged(when_changed), content.get("show"))


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigurationError(f"{path} is not a file; name the YAML of a pipeline{_known()}")
        return path
    known = conf_folder() / FOLDER / f"{name_or_path}.yaml"
    if not known.is_file():
        raise ConfigurationError(f"there is no pipeline {name_or_path}; name a .yaml file{_known()}")
    # As a user in the checkout would write it.
    return known.relative_to(Path.cwd()) if known.is_relative_to(Path.cwd()) else known


def _known() -> str:
    names = sorted(path.stem for path in (conf_folder() / FOLDER).glob("*.yaml"))
    return f", or one of {', '.join(names)}" if names else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigurationError(f"cannot read {path}: {reason}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig):
        raise ConfigurationError(f"{path} must hold name: value lines, steps among them")
    content = OmegaConf.to_container(values, resolve=False)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def _mapping(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: {what} must hold name: value lines")
    for name in value:
        if not isinstance(name, str):
            raise ConfigurationError(f"{path}: {what} has the name {name!r}, which is no text; quote it")
    return value


def _override(path: Path, variables: dict[str, Any], steps: dict[str, Any], override: str) -> None:
    """Change ``variables`` or ``steps``."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigurationError(f"the argument {override!r} is not name=value, e.g. output=outputs/mine")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(
            f"the value of {override!r} cannot be read as YAML; quote it, e.g. name='\"a: b\"'"
        ) from None
    # A value that looks like nothing but text to a shell user should not become a date.
    value = value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else text
    referred = step_of(name)
    if referred is None:
        if name not in variables:
            known = [*variables, "steps.<step>.<setting>"]
            raise ConfigurationError(
                f"{path}: {name} is not a variable{did_you_mean(name, variables) or ';'} there are "
                f"{', '.join(known)}"
            )
        variables[name] = value
        return
    step, setting = referred
    if step not in steps:
        raise ConfigurationError(
            f"{path}: there is no step {step}{did_you_mean(step, steps) or ';'} there are {', '.join(steps)}"
        )
    if not setting:
        raise ConfigurationError(f"{override} names no setting; write steps.{step}.<setting>=<value>")
    group, dot, inner = setting.partition(".")
    if dot and isinstance(steps[step].setdefault(group, {}), dict):
        steps[step][group][inner] = value  # settings of spikingbrain-train have dotted names
    else:
        steps[step][setting] = value
