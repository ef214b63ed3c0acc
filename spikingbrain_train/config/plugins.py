"""Modules that register kinds of their own: ``plugins=[package.module]``.

They are imported before a config is composed, because their kinds bring settings. A run names them on its
command line, in its experiment or in the stored config that it is given; nothing that merely lies in a
checkpoint is ever imported.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from spikingbrain_train.config.import_path import find_in_current_folder, reason_of
from spikingbrain_train.config.yaml_files import conf_folder, read_yaml
from spikingbrain_train.errors import ConfigurationError


def load_plugins(modules: Iterable[str]) -> None:
    """Import modules that register kinds; the current folder counts, as with ``python -m``.

    Raises:
        ConfigurationError: one cannot be imported.
    """
    for module in modules:
        find_in_current_folder()
        try:
            importlib.import_module(module)
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"plugins names {module}, which cannot be imported: {reason_of(error)}; write "
                f"package.module, with its folder on PYTHONPATH"
            ) from error


def add_plugins_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    """``--plugins package.module,...`` of a tool; read it with :func:`plugins_of`.

    Args:
        parser: of the tool.
        more: what its help says beyond what the modules are.
    """
    parser.add_argument(
        "--plugins",
        type=lambda text: text.strip("[]").split(","),
        default=[],
        metavar="MODULE,...",
        help="modules of other packages that bring kinds of mixers and feed-forwards, as package.module"
        + more,
    )


def plugins_of(values: Any, where: str) -> list[str]:
    """The modules that a config names under ``plugins``.

    Args:
        values: a mapping, or None.
        where: what it is, for the sentence.

    Raises:
        ConfigurationError: it is no list of names.
    """
    named = (values or {}).get("plugins") or []
    is_list = isinstance(named, Sequence) and not isinstance(named, str)
    if not is_list or not all(isinstance(module, str) and module for module in named):
        raise ConfigurationError(f"{where} has plugins={named}; it takes a list [package.module,...]")
    return list(named)


def plugins_of_command_line(arguments: Sequence[str], stored: Path | None = None) -> list[str]:
    """The plugins of a run, found before its config is composed.

    They are those of its command line, else of its experiment, else of the stored config that it is given.

    Raises:
        ConfigurationError: they are no list of names.
    """
    folders = [conf_folder()]
    experiment: str | None = None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            continue
        if name.lstrip("+") in ("plugins", "hydra.searchpath"):
            try:
                parsed = OverridesParser.create().parse_override(argument).value()
            except HydraException:
                continue  # composing is about to say why
            if name.endswith("plugins"):
                return plugins_of({"plugins": parsed}, "the command line")
            entries = parsed if isinstance(parsed, list) else []
            folders += [Path(str(entry).removeprefix("file://")) for entry in entries]
        elif name.lstrip("+") == "experiment":
            experiment = value
    files = [folder / "experiment" / f"{experiment}.yaml" for folder in folders]
    for path in [*(files if experiment else []), *([stored] if stored else [])]:
        if path.is_file() and (found := plugins_of(read_yaml(path), str(path))):
            return found
    return []
