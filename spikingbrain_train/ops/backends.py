"""Which optional kernel libraries this process can import."""

from __future__ import annotations

import importlib.util
from functools import cache

from spikingbrain_train.config.errors import PlatformError


@cache
def has_package(name: str) -> bool:
    """Whether a top-level package is installed; asked once, without importing it."""
    return importlib.util.find_spec(name) is not None


def require_package(name: str, distribution: str, setting: str) -> None:
    """Raise :class:`PlatformError` with one sentence unless the package is installed."""
    if not has_package(name):
        raise PlatformError(f"{setting} needs the package {distribution}: install it or choose auto.")


def require_gpu(device_type: str, setting: str) -> None:
    """Raise :class:`PlatformError` with one sentence unless the tensors are on a GPU."""
    if device_type != "cuda":
        raise PlatformError(f"{setting} needs tensors on a GPU, not on {device_type}: choose auto.")


def unknown_backend(setting: str, known: tuple[str, ...]) -> ValueError:
    """The error for a backend name that does not exist."""
    return ValueError(f"{setting} is unknown: choose one of {', '.join(known)}.")
