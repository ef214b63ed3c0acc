"""A variable that lets kernels start in another order than they were queued in is said where it costs."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.config.parallel import AcceleratorKind, ParallelConfig
from spikingbrain_train.runtime.accelerator import CONNECTIONS, Accelerator
from spikingbrain_train.runtime.kernel_order import kernel_order_warning

GPU, METAX, CPU = (
    Accelerator(kind, kind.value, 8, {})
    for kind in (AcceleratorKind.cuda, AcceleratorKind.metax, AcceleratorKind.cpu)
)
TENSOR = ParallelConfig(tensor_model_parallel_size=2)
CONTEXT = ParallelConfig(context_parallel_size=4)
WITHOUT = ParallelConfig(pipeline_model_parallel_size=2)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize("accelerator", [GPU, METAX])
@pytest.mark.parametrize(
    ("parallel", "setting"),
    [(TENSOR, "parallel.tensor_model_parallel_size=2"), (CONTEXT, "parallel.context_parallel_size=4")],
)
def test_a_contrary_value_is_said_with_what_needs_the_order(
    accelerator: Accelerator, parallel: ParallelConfig, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONNECTIONS, "8")
    warning = kernel_order_warning(parallel, accelerator)
    assert warning is not None and warning.startswith(f"warning: {CONNECTIONS}=8 ") and setting in warning
    assert warning.endswith("unset it or set it to 1")


def test_nothing_is_said_where_nothing_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONNECTIONS, "8")
    assert kernel_order_warning(WITHOUT, GPU) is None
    assert kernel_order_warning(TENSOR, CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert kernel_order_warning(TENSOR, GPU) is None
    monkeypatch.setenv(CONNECTIONS, "1")
    assert kernel_order_warning(TENSOR, METAX) is None
    monkeypatch.delenv(CONNECTIONS)
    assert kernel_order_warning(TENSOR, METAX) is None
