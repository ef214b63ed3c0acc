"""The same in a process whose torch is built for CUDA: its own fake tensors, over a driver that does nothing.

On a machine without a GPU torch's CUDA build makes tensors that say ``cuda:0`` of themselves
(FakeTensorMode), and checks devices and shapes of every operator as its kernels for CUDA would. Autograd asks
the driver how many GPUs there are; driver.c answers. So nothing is renamed: what code hears of a tensor is
what torch says of it. What is recorded, and what stands for values of the GPU, is
:mod:`tests.fake_gpu.fake_cuda`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.fake_gpu.fake_cuda import (
    Findings,
    HostMemory,
    Watch,
    functions_changed,
    is_gpu,
    played_functions,
)


class Fake(FakeTensorMode):
    """Of tensors of the GPU alone: those of the CPU are real ones."""

    avoid_device_init = True  # whatever torch.cuda says


class FakeWatch(Watch):
    """See :class:`Watch`; tensors of the GPU have no memory and no values."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fake = Fake(allow_non_fake_inputs=True)

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not is_gpu(kwargs.get("device")):  # it computes with what it is given, and fake tensors know how
            return func(*args, **kwargs)
        with self.fake:
            return func(*args, **kwargs)


def _stay(parameter: Tensor, moved: Tensor) -> None:
    """torch.utils.swap_tensors of a module that is told to go where it is: fake tensors are remembered by
    their mode and cannot be swapped."""
    assert parameter.device == moved.device and parameter.dtype == moved.dtype


@contextlib.contextmanager
def cuda_build(
    value_of: Callable[[Tensor], Tensor], selected_by: Callable[[Tensor], int]
) -> Iterator[Findings]:
    """What :func:`tests.fake_gpu.fake_cuda.fake_cuda` is for torch's CPU build."""
    findings, only_cpu = Findings(), torch._C._only_lift_cpu_tensors()
    with (
        played_functions(),
        # So that the record names who called, as the CPU build's does: no threads for each GPU.
        torch.autograd.set_multithreading_enabled(False),
        mock.patch.object(torch.utils, "swap_tensors", _stay),
        mock.patch.object(FakeTensor, "tolist", lambda x: x.to("cpu").tolist()),  # its own asks one by one
        functions_changed(HostMemory()),
        FakeWatch(findings, value_of, selected_by),
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device="cuda") copies by an operator
        try:
            yield findings
        finally:
            torch._C._set_only_lift_cpu_tensors(only_cpu)
