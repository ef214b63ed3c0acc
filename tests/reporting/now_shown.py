"""What a command says on standard error that it is doing, asked from within the doing."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from spikingbrain_train.reporting import activity as module


def now_shown() -> str:
    """The status that a log gets once it has been silent for some seconds; empty if it gets none."""
    return module._on_standard_error()._status.text


class Imported(Exception):
    """A module is about to be imported; the message is what is shown meanwhile."""


class _Watch(importlib.abc.MetaPathFinder):
    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == self.name:
            raise Imported(now_shown())
        return None


def stop_at_import(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have the next import of ``name`` raise :class:`Imported`, as if nobody had imported it before."""
    patch.delitem(sys.modules, name, raising=False)
    patch.setattr(sys, "meta_path", [_Watch(name), *sys.meta_path])
