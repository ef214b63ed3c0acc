"""A GPU that computes nothing: torch's meta device, which says of itself that it is CUDA.

Within :func:`fake_cuda` whoever asks for a tensor on "cuda", ``torch.device("cuda", 0)`` or the current
device gets one on the meta device, and whoever asks where that tensor is hears ``cuda:0``. So code takes the
paths of a GPU, in a process whose torch has none. Two modes watch it: one at torch's functions, which does
the renaming, one at its operators, which keeps a record of what would be wrong or slow on a GPU
(:class:`Findings`).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)


@dataclass
class Findings:
    """What happened, and where: ``file:function`` of the nearest code of ours, megatron-core or DeepSpeed."""

    mixed: Counter[str] = field(default_factory=Counter)
    """Operators with tensors of the GPU and of the CPU. CUDA refuses most, and is slow with the rest."""
    waits: Counter[str] = field(default_factory=Counter)
    """The CPU waits for the GPU: ``item``, ``bool``, ``tolist``, ``nonzero``, masks, copies to the CPU, and
    to the GPU where they are not ``non_blocking`` or begin as a list."""
    on_cpu: Counter[str] = field(default_factory=Counter)
    """Operators that compute on the CPU."""
    products: Counter[str] = field(default_factory=Counter)
    """Matrix products by dtype and place."""

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {name: dict(counter) for name, counter in vars(self).items()}

    def clear(self) -> None:
        for counter in (self.mixed, self.waits, self.on_cpu, self.products):
            counter.clear()


def place() -> str:
    """The innermost function on the stack that is not torch's nor this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for package in ("spikingbrain_train/", "megatron/core/", "deepspeed/"):
            if package in name and "tests/" not in name:
                return f"{package.split('/')[0]}/{name.rpartition(package)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def is_gpu(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


# A getter is another object each time that it is asked for, but equal to itself.
_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class HostMemory(TorchFunctionMode):
    """What torch's functions do with memory of the host, without a driver that could pin it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.is_pinned:
            return False
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.tensor:  # of a list of tensors: each is waited for
            args = (tree_map_only(Tensor, lambda each: each.item(), args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class Names(TorchFunctionMode):
    """ "cuda" is the meta device, and the meta device is "cuda:0"."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self.findings = findings

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        if func == _DEVICE:
            found = func(*args)
            return GPU if found.type == "meta" else found
        if func == _IS_CUDA:
            return args[0].is_meta
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.meta", "torch.cuda")
        if is_gpu(kwargs.get("device")) or type(kwargs.get("device")) is int:
            kwargs["device"] = "meta"
        args = tuple("meta" if is_gpu(each) else each for each in args)
        made = func(*args, **kwargs)
        # On a GPU these make a tensor of the CPU and copy it; on the meta device no operator tells of it.
        if func in _OF_NUMBERS and made.is_meta and not any(isinstance(each, Tensor) for each in args[-1:]):
            self.findings.waits[f"{_TO_GPU} {place()}"] += 1
        return made


_TO_GPU = "to the GPU"
_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


# What waits for a value of the GPU by its nature.
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
}
_WAITS |= {"aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"}
_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


def _tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """An operator's: tensors, and lists of them. Torch's search of a tree takes as long as an operator."""
    for each in arguments:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors_in(each)


def _counts_a_mask(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator needs to know how many elements of a mask are true; one value for all does not."""
    if name not in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        return False
    has_mask = any(getattr(each, "dtype", None) == torch.bool for each in args[1])
    return has_mask and (len(args) < 3 or args[2].numel() > 1)


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


class Watch(TorchDispatchMode):
    """Writes into ``findings`` what operators are called with.

    Args:
        findings: the record.
        value_of: numbers that stand for those of a tensor of the GPU when the CPU asks for them: a tensor of
            its shape and dtype on the CPU.
        selected_by: how many elements of a mask on the GPU are true.
    """

    def __init__(
        self, findings: Findings, value_of: Callable[[Tensor], Tensor], selected_by: Callable[[Tensor], int]
    ) -> None:
        super().__init__()
        self.selected_by = selected_by
        self.findings = findings
        self.value_of = value_of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        on_gpu = [each for each in tensors if not _is_on_cpu(each)]
        # Numbers that are tensors without dimensions may be on the CPU: kernels take them by value.
        on_cpu = [each for each in tensors if _is_on_cpu(each) and each.dim() > 0]
        if on_gpu:
            if name in _WAITS:
                self.findings.waits[f"{name.partition('::')[2]} {place()}"] += 1
                return self._known(name, on_gpu[0], args)
            if _counts_a_mask(name, args):
                self.findings.waits[f"mask {place()}"] += 1
            if name == "aten::_to_copy" and str(kwargs.get("device")) == "cpu":
                self.findings.waits[f"to the CPU {place()}"] += 1
                return self.value_of(on_gpu[0]).to(kwargs.get("dtype") or on_gpu[0].dtype)
            if name == "aten::copy_" and _is_on_cpu(args[0]):
                self.findings.waits[f"to the CPU {place()}"] += 1
                return args[0].copy_(self.value_of(args[1]))
            if name == "aten::copy_" and _is_on_cpu(args[1]) and not (args[2:] or (False,))[0]:
                self.findings.waits[f"{_TO_GPU} {place()}"] += 1
            if on_cpu and name not in _COPIES:
                self.findings.mixed[f"{name.partition('::')[2]} {place()}"] += 1
            if name in _PRODUCTS:
                self.findings.products[f"{on_gpu[0].dtype} {place()}".removeprefix("torch.")] += 1
            if name == "aten::_fused_adamw_":
                return None
        elif name == "aten::_to_copy" and self.leaves_the_cpu(kwargs):
            self.findings.waits[f"{_TO_GPU} {place()}"] += 1
        if name.startswith("c10d::") and name.endswith("coalesced_"):
            # Of these torch has no form for the meta device. They return what is waited for alone, and a
            # group that talks to nobody asks nothing of its tensors.
            args, kwargs = tree_map_only(Tensor, lambda each: torch.empty(0, device="cpu"), (args, kwargs))
            return func(*args, **kwargs)
        if on_cpu and not on_gpu:
            self.findings.on_cpu[f"{name.partition('::')[2]} {place()}"] += 1
        return self.computed(func, args, kwargs)

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator of which a record has been made."""
        return func(*args, **kwargs)

    def leaves_the_cpu(self, copied: dict[str, Any]) -> bool:
        device = copied.get("device")
        return device is not None and device.type != "cpu" and not copied.get("non_blocking")

    def _known(self, name: str, x: Tensor, args: Any) -> Any:
        if name == "aten::_local_scalar_dense":
            return self.value_of(x).flatten()[0].item()
        if name == "aten::masked_select":
            return args[0].new_empty(self.selected_by(args[1]))
        if name == "aten::bincount":  # it asks for the largest; here that is below what it is told to expect
            return x.new_empty(args[2], dtype=torch.int64)
        if name == "aten::nonzero":
            return x.new_empty((self.selected_by(x), x.dim()), dtype=torch.int64)
        raise NotImplementedError(f"{name} of a GPU that computes nothing")


class Stream:
    """Stands for a CUDA stream or event: nothing is ever pending."""

    device = GPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def elapsed_time(self, later: Stream) -> float:
        return 1.0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def _exchange(operations: Sequence[Any]) -> list[Stream]:
    """torch.distributed.batch_isend_irecv, which looks for the group of a device by its name."""
    for each in operations:
        assert each.tensor.is_cuda and each.tensor.is_contiguous(), (
            "NCCL sends what lies in one piece on the GPU"
        )
    return [Stream() for _ in operations]


def _cuda_functions() -> dict[str, Any]:
    generator = torch.Generator()
    stream = Stream()

    def set_state(state: Tensor, device: Any = None) -> None:
        generator.set_state(state)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "a GPU that computes nothing",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            total_memory=80 * 2**30, major=9, minor=0
        ),
        "is_bf16_supported": lambda including_emulation=True: True,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Stream,
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": set_state,
        "default_generators": (generator,) * 8,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        "is_current_stream_capturing": lambda: False,
        "range_push": lambda name: 0,
        "range_pop": lambda: 0,
    }


@contextlib.contextmanager
def played_functions() -> Iterator[None]:
    """torch.cuda's functions, and what of torch.distributed looks for a GPU behind them."""
    with contextlib.ExitStack() as stack:
        for name, replacement in _cuda_functions().items():
            for module in (torch.cuda, torch.cuda.random, torch.cuda.nvtx):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        stack.enter_context(mock.patch.object(torch.distributed, "batch_isend_irecv", _exchange))
        yield


@contextlib.contextmanager
def functions_changed(*modes: TorchFunctionMode) -> Iterator[None]:
    """Within ``modes``, in backward passes, too: torch leaves them while a function of its own runs, and
    backward is one."""
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return run_backward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        for mode in modes:
            stack.enter_context(mode)
        yield


@contextlib.contextmanager
def fake_cuda(
    value_of: Callable[[Tensor], Tensor], selected_by: Callable[[Tensor], int]
) -> Iterator[Findings]:
    """Code within takes the paths of a GPU; for what it is given see :class:`Watch`."""
    findings = Findings()
    with (
        played_functions(),
        # Computing again asks for the module of the device that its tensors are on.
        mock.patch.object(torch, "meta", torch.cuda, create=True),
        functions_changed(Names(findings), HostMemory()),
        Watch(findings, value_of, selected_by),
    ):
        yield findings
