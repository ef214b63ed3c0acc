"""Which optional kernel libraries this process can use."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

from spikingbrain_train.errors import PlatformError

# Where the kernels of a package lie, if not in the module of its name, and one that is called.
_KERNELS: dict[str, tuple[str, str]] = {
    "flash_attn": ("flash_attn", "flash_attn_func"),
    "fla": ("fla.ops.gla", "chunk_gla"),
    "transformer_engine": ("transformer_engine.pytorch", "Linear"),
    "grouped_gemm": ("grouped_gemm", "ops"),
}


@cache
def package_failure(name: str) -> str | None:
    """Why a package's kernels cannot be used, in words behind its name; None if they can.

    Finding it is not enough: a build for another torch, a package without its GPU part, or another one under
    the same name (flash-attn-4 fills ``flash_attn`` without ``flash_attn_func``) fails when it is called. So
    it is imported, once; ask only where its kernels would run.
    """
    if importlib.util.find_spec(name) is None:
        return "is not installed"
    module, kernel = _KERNELS.get(name, (name, ""))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a library that is built for another torch raises anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"is installed but does not import ({reason})"
    return None if not kernel or hasattr(found, kernel) else f"is installed but has no {module}.{kernel}"


def has_package(name: str) -> bool:
    """Whether a package is installed and its kernels can be called; see :func:`package_failure`."""
    return package_failure(name) is None


def require_package(name: str, distribution: str, setting: str) -> None:
    """Raise :class:`PlatformError` with one sentence unless the package can be used."""
    failure = package_failure(name)
    if failure is not None:
        raise PlatformError(
            f"{setting} needs the package {distribution}, which {failure}: install it or choose auto."
        )


def require_gpu(device_type: str, setting: str) -> None:
    """Raise :class:`PlatformError` with one sentence unless the tensors are on a GPU."""
    if device_type != "cuda":
        raise PlatformError(f"{setting} needs tensors on a GPU, not on {device_type}: choose auto.")


def unknown_backend(setting: str, known: tuple[str, ...]) -> ValueError:
    """The error for a backend name that does not exist."""
    return ValueError(f"{setting} is unknown: choose one of {', '.join(known)}.")
