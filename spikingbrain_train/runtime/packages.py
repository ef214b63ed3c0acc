"""Which optional kernel libraries this process can use, and which releases of them."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

from spikingbrain_train.architecture.backends.backend import Machine

# Where the kernels of a package lie, if not in the module of its name, and one that is called.
_KERNELS: dict[str, tuple[str, str]] = {
    "flash_attn": ("flash_attn", "flash_attn_func"),
    "fla": ("fla.ops.gla", "chunk_gla"),
    "mamba_ssm": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
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


def defines(name: str) -> bool:
    """Whether ``package.module:name`` is there and not None: what some releases have and others lack."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute, None) is not None


def machine_of(device_type: str) -> Machine:
    """What the backends of an op ask about where its tensors are.

    Args:
        device_type: ``cuda``, ``cpu`` or another of torch's.
    """
    import torch

    return Machine(
        device_type == "cuda",
        lambda name: package_failure(name),
        lambda name: defines(name),
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
    )
