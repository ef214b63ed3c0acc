"""YAML files of settings, and the list ``defaults`` on top of one, which names the files that it is made of.

Recipes of conversions are read here, without Hydra; the list means what it means under Hydra for conf/model:
every file comes on top of those before it, and the file itself where ``_self_`` stands, else last.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from spikingbrain_train.errors import ConfigurationError


def conf_folder() -> Path:
    """The folder of Hydra groups: ``conf/`` of the checkout, or the copy that an installed package has."""
    package = Path(__file__).resolve().parents[1]
    # The package's own first: beside an installed one lies whatever else is installed.
    for candidate in ((package / "conf").resolve(), package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigurationError(
        f"the conf folder is in neither {package.parent} nor {package}; reinstall, or run from a checkout"
    )


def read_yaml(path: Path) -> DictConfig:
    """The settings in one file. Raises ConfigurationError, naming the file."""
    try:
        values = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(values, DictConfig):
        raise ConfigurationError(f"{path} must hold name: value lines")
    return values


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """libyaml's where PyYAML has it."""

    def ignore_aliases(self, data: Any) -> bool:
        """A list that two settings share is written twice, without names like ``&id001``."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if _reads_otherwise(text) else None
    )


def _reads_otherwise(text: str) -> bool:
    """Whether OmegaConf would read the text as a number or a truth value: ``1e5``, ``yes``."""
    if text.lower() in {"y", "yes", "n", "no", "on", "off", "true", "false"}:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


_Dumper.add_representer(str, _represent_text)


def yaml_of(settings: dict[str, Any]) -> str:
    """What ``OmegaConf.to_yaml`` makes of plain values and enums, in a tenth of its time.

    A checkpoint holds two configs, which rank 0 writes while the others wait.
    """
    plain = _plain(settings)
    return yaml.dump(plain, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def read_composed(path: Path, group: str, inside: tuple[Path, ...] = ()) -> DictConfig:
    """The settings in a file on top of those of the files that its ``defaults`` name.

    Args:
        path: the file.
        group: the folder of conf/ in which a plain name is looked for, if it is not that of a file beside.
        inside: the files that name this one, outermost first.

    Raises:
        ConfigurationError: a file cannot be read, names one that is not there, or is made of itself.
    """
    if path in inside:
        raise ConfigurationError(f"{path}: defaults lead back to this file; take {path.stem} out of them")
    values = read_yaml(path)
    entries = values.pop("defaults", None)
    if entries is None:
        return values
    if not isinstance(entries, ListConfig):
        raise ConfigurationError(f"{path}: defaults must be a list of names, e.g. [spikingbrain_7b, _self_]")
    names = [*entries, *([] if "_self_" in entries else ["_self_"])]
    parts = [
        values if name == "_self_" else read_composed(_named(name, path, group), group, (*inside, path))
        for name in names
    ]
    return cast(DictConfig, OmegaConf.merge(*parts))


def _named(name: object, path: Path, group: str) -> Path:
    """The file that an entry of ``defaults`` means: ``/layers/x@_here_`` is conf/layers/x.yaml."""
    text = str(name).removesuffix("@_here_")
    folder = conf_folder() / group
    candidates = [path.parent / f"{text}.yaml", folder / f"{text}.yaml"]
    if text.startswith("/"):
        candidates = [conf_folder() / f"{text[1:]}.yaml"]
    for candidate in candidates if isinstance(name, str) else []:
        if candidate.is_file() and candidate != path:
            return candidate
    known = [file.stem for file in sorted(folder.glob("*.yaml"))]
    known += [f"/layers/{file.stem}@_here_" for file in sorted((conf_folder() / "layers").glob("*.yaml"))]
    raise ConfigurationError(
        f"{path}: defaults name {name}, which is not there; name _self_, a .yaml file beside it without its "
        f"ending, or one of {', '.join(known)}"
    )
