"""Numbers of the host on their way to a device. That nothing waits for them on a GPU: tests/fake_gpu."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.host_numbers import on_device
from tests.fake_gpu.fake_cuda import fake_cuda

CPU = torch.device("cpu")


@pytest.mark.parametrize("numbers", [[0, 3, 5], torch.tensor([0, 3, 5]), []])
def test_numbers_arrive_as_they_are(numbers: list[int] | torch.Tensor) -> None:
    there = on_device(numbers, CPU, torch.int32)
    assert there.dtype == torch.int32 and there.tolist() == list(numbers)


def test_no_gpu_is_waited_for() -> None:
    with fake_cuda(torch.zeros_like, torch.numel) as findings:
        there = on_device([True, False], torch.device("cuda", 0), torch.bool)
        assert there.is_cuda and there.dtype == torch.bool and there.shape == (2,)
        assert not findings.waits
        torch.tensor([1.0], device="cuda")
        torch.ones(1).to("cuda")
        assert findings.waits == {"to the GPU elsewhere": 2}
