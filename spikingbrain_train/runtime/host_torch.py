"""A view of ``torch`` for megatron-core's modules in which "cuda" means this host's memory.

megatron-core names the GPU in many places: ``torch.zeros(1, device="cuda")``,
``torch.cuda.current_device()``, ``torch.cuda.synchronize()``. Instead of changing torch for the whole
process, or taxing every operation with a ``TorchFunctionMode``, the global name ``torch`` inside megatron's
modules is bound to :data:`HOST_TORCH`: a module object with torch's own attributes, except for the factories
that take ``device=`` and the ``cuda`` submodule. Everything outside megatron keeps the real torch, and
operations on tensors cost what they always cost.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

# The torch functions that megatron-core 0.16.1 to 0.19.2 calls with device="cuda" or the like.
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "tensor", "zeros")


class HostStream:
    """Stands for a CUDA stream: host work is done when the call returns, so nothing is ever pending."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: HostStream) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def record_event(self) -> HostStream:
        """An event that has happened: something with a ``synchronize`` that need not wait."""
        return self


HOST_STREAM = HostStream()


class _Overlay(ModuleType):
    """A module with another module's attributes and some of its own."""

    def __init__(self, base: ModuleType, **own: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(vars(base))  # a copied dict makes attribute lookup as fast as on the real module
        self.__dict__.update(own)
        self.__dict__["_base"] = base

    def __getattr__(self, name: str) -> Any:  # submodules imported later, and torch's own lazy attributes
        return getattr(self.__dict__["_base"], name)


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def host_factory(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if _names_cuda(device) else device, **kwargs)

    return host_factory


def _host_cuda() -> ModuleType:
    host = torch.device("cpu")
    return _Overlay(
        torch.cuda,
        is_available=lambda: False,
        device_count=lambda: 0,
        current_device=lambda: host,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        current_stream=lambda device=None: HOST_STREAM,
        default_stream=lambda device=None: HOST_STREAM,
        stream=lambda stream: contextlib.nullcontext(),
        Stream=HostStream,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda new_state, device="cuda": torch.set_rng_state(new_state),
    )


HOST_TORCH = _Overlay(
    torch, cuda=_host_cuda(), **{name: _on_host(getattr(torch, name)) for name in FACTORIES}
)


def rebind_loaded_modules(package: str) -> None:
    """Bind ``torch`` to :data:`HOST_TORCH` in every loaded module of ``package``."""
    for name, module in list(sys.modules.items()):
        if module is not None and (name == package or name.startswith(f"{package}.")):
            rebind(module)


def rebind(module: ModuleType) -> None:
    """Bind ``torch`` to :data:`HOST_TORCH` in one module, if it uses torch."""
    if vars(module).get("torch") is torch:
        vars(module)["torch"] = HOST_TORCH


class RebindOnImport(importlib.abc.MetaPathFinder):
    """Lets other finders find the modules of ``package`` and rebinds each one's ``torch`` once it has run."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See :meth:`importlib.abc.MetaPathFinder.find_spec`."""
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is None:
                continue
            if spec.loader is not None:
                _rebind_after_exec(spec.loader)
            return spec
        return None


def _rebind_after_exec(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        rebind(module)

    loader.exec_module = exec_module
