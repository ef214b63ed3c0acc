"""INT8 inputs in blocks against ggml's own rounding, as it comes with llama.cpp: bit for bit.

``quantize_row_q8_0`` is that of x86 with AVX: ggml's reference, for other CPUs, divides twice and rounds
halves away from zero.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.q8_inputs import Q8_0, Q8_K, block_of
from spikingbrain_train.conversion.formats.gguf import GGUF, GGUF_Q2_0
from spikingbrain_train.ops.int8_blocks import int8_block_codes, int8_block_rounding
from tests.conversion.conftest import llama_cpp  # noqa: F401


def _q8_k(library: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, 256] and scales [N, 1]: a float, the codes, and sixteen sums of them."""
    rows = _quantized(library.quantize_row_q8_K, x, 4 + 256 + 32)
    return _codes(rows[:, 4:260]), torch.from_numpy(rows[:, :4].copy().view(np.float32))


def _q8_0(library: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, 32] and scales [N, 1]: a float16 and the codes."""
    rows = _quantized(library.quantize_row_q8_0, x, 2 + 32)
    return _codes(rows[:, 2:]), torch.from_numpy(rows[:, :2].copy().view(np.float16)).float()


def _codes(found: np.ndarray) -> Tensor:
    return torch.from_numpy(found.copy().view(np.int8)).float()


def _quantized(function: Any, x: Tensor, nbytes: int) -> np.ndarray:
    """[N, bytes] uint8 of x [N, S]."""
    values = np.ascontiguousarray(x.numpy(), dtype=np.float32)
    made = np.zeros((len(values), nbytes), dtype=np.uint8)
    function.restype = None
    into, out = (ctypes.c_void_p(each.ctypes.data) for each in (values, made))
    function(into, out, ctypes.c_int64(values.size))
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)  # llama.cpp may have to be built
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs round halves otherwise")
@pytest.mark.parametrize(("size", "theirs"), [(Q8_K, _q8_k), (Q8_0, _q8_0)], ids=["Q8_K", "Q8_0"])
def test_blocks_are_ggmls_bit_for_bit(
    size: int,
    theirs: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
    llama_cpp: Any,  # noqa: F811
) -> None:
    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-cpu.so")
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(4000, size, generator=generator) * torch.logspace(-6, 4, 4000).unsqueeze(-1)
    x[1] = 0
    x[2] = torch.arange(size) / 2 % 64 - 31.5  # every other one lies between two codes
    x[2, 5] = -127
    codes, scales = theirs(ctypes.CDLL(str(path)), x)
    ours, our_scales = int8_block_codes(x, size)
    assert ours.shape == (4000, 1, size) and our_scales.shape == (4000, 1, 1)
    turned = torch.where(scales < 0, -1.0, 1.0)  # Q8_K has a negative scale where the largest is positive
    nonzero = scales.flatten() != 0
    assert torch.equal(ours[nonzero, 0], (codes * turned)[nonzero])
    assert torch.equal(our_scales[nonzero, 0], (scales * turned)[nonzero])
    assert torch.equal(int8_block_rounding(x, size), codes * scales)
    assert nonzero.sum() > 3000 and ours.abs().max() == 127


@pytest.mark.parametrize("size", [Q8_K, Q8_0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_pass_and_numbers_of_any_size_stay_finite(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for scale in (0.0, 1e-38, 1e-3, 1.0, 1e30):
        x = (torch.randn(3, 2, 2 * size, generator=generator) * scale).to(dtype).requires_grad_()
        rounded = int8_block_rounding(x, size)
        assert rounded.dtype is dtype and rounded.shape == x.shape and rounded.isfinite().all()
        grad = torch.randn(x.shape, generator=generator).to(dtype)
        rounded.backward(grad)
        assert torch.equal(x.grad, grad)
        if scale == 1.0:
            step = x.detach().unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True).double() / 127
            off = (rounded.detach() - x.detach()).double().unflatten(-1, (-1, size)).abs()
            assert (off <= step * (0.5 + 127 * (2**-11 + torch.finfo(dtype).eps))).all()


@pytest.mark.parametrize("inputs", [32, 64, 96, 256, 576, 768, 1536, 8192])
def test_the_block_is_that_of_the_type_that_a_gguf_file_has(inputs: int) -> None:
    for hf_format in (GGUF, GGUF_Q2_0):
        kind = next(each for each in hf_format.types if inputs % each.size == 0)
        assert block_of(inputs) == kind.input_block
