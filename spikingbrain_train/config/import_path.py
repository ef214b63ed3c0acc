"""Objects named by where they are imported from, so that what names them need not import them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from spikingbrain_train.errors import ConfigurationError


def find_in_current_folder() -> None:
    """Let imports find what lies in the current folder, too, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def object_at(path: str) -> Any:
    """The object that ``package.module.Name`` or ``package.module:Name`` is.

    Raises:
        ImportError: there is no such module, it cannot be imported, or it has no such name; says which.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ImportError(f"{path} names no module")
    try:
        return getattr(import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error


def import_path_of(kind: type) -> str:
    """Where a class is imported from: ``package.module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def object_of_kind(path: str, kind: str) -> Any:
    """What the description of a kind names: its module, its transform, its trainer.

    Args:
        path: as of :func:`object_at`.
        kind: what names it, for the sentence: ``mixer gla``.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    try:
        return object_at(path)
    except Exception as error:  # a module may fail in any way
        raise ConfigurationError(
            f"{kind} is made by {path}, which cannot be imported: {reason_of(error)}; correct the path in "
            f"its description, or install what the module needs"
        ) from error


def reason_of(error: Exception) -> str:
    """Why an import failed, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
