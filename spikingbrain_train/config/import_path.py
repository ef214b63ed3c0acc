"""Objects named by where they are imported from, so that what names them need not import them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any


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
