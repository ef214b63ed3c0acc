"""Which number format a model runs in here, decided with torch: one rule for training and for every tool.

The rule itself, and what can be said of it without torch, is in planning/precision.py.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from spikingbrain_train.config.run import Precision
from spikingbrain_train.planning.precision import PrecisionChoice, bf16_instructions, choice_on_cpu
from spikingbrain_train.runtime.accelerator import Accelerator

PARAMS_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
"""The dtype of weights and activations for each precision."""

_PRODUCT_SIZE = 512
_PRODUCT_TRIES = 5
_NOTABLE_SLOWDOWN = 1.5


def choose_precision(accelerator: Accelerator) -> PrecisionChoice:
    """bf16 where this process's device multiplies it, else fp32."""
    if accelerator.is_gpu:
        if torch.bfloat16 in accelerator.supported_dtypes:
            return PrecisionChoice(Precision.bf16, f"because {accelerator.device_name} multiplies it")
        return PrecisionChoice(Precision.fp32, f"because {accelerator.device_name} has no bf16")
    instructions = bf16_instructions()
    if instructions is not None and instructions == _onednn_takes_bf16():
        return choice_on_cpu(instructions)
    # The system does not tell, or torch tells otherwise: it counts AVX-512 without bf16 instructions as able.
    slowdown = product_slowdown(torch.bfloat16)
    if slowdown < 1:
        measured = f"this CPU multiplies it {1 / slowdown:.1f} times as fast as fp32 (measured)"
        return PrecisionChoice(Precision.bf16, f"because {measured}")
    measured = f"this CPU multiplies bf16 {slowdown:.1f} times slower (measured)"
    return PrecisionChoice(Precision.fp32, f"because {measured}")


def slow_format_warning(setting: str, dtype: torch.dtype, accelerator: Accelerator) -> str | None:
    """A sentence if models in ``dtype`` are much slower here than in float32, else None.

    Args:
        setting: what asks for it, as the user writes it (``precision=bf16``).
        dtype: number format of weights and activations.
        accelerator: this process's platform.
    """
    if accelerator.is_gpu or dtype not in (torch.bfloat16, torch.float16):
        return None
    if dtype is torch.bfloat16 and choose_precision(accelerator).precision is Precision.bf16:
        return None
    slowdown = product_slowdown(dtype)
    if slowdown < _NOTABLE_SLOWDOWN:
        return None
    return (
        f"warning: {setting} is slow here: this CPU multiplies such numbers {slowdown:.0f} times slower than "
        f"fp32 (measured)"
    )


@lru_cache(maxsize=4)
def product_slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in ``dtype`` on this CPU, in units of the same product in float32.

    Measured once per process, in CPU time, so that other load does not count; a tenth of a second, some
    seconds where ``dtype`` is slow.
    """
    fast, slow = _product_seconds(torch.float32), _product_seconds(dtype)
    return slow / max(fast, 1e-9)


def _product_seconds(dtype: torch.dtype) -> float:
    a, b = (torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE).to(dtype) for _ in range(2))
    torch.mm(a, b)  # warm-up
    tries = []
    for _ in range(_PRODUCT_TRIES):
        begin = time.process_time()
        torch.mm(a, b)
        tries.append(time.process_time() - begin)
    return min(tries)


def _onednn_takes_bf16() -> bool:
    """Whether oneDNN is there and says that it can compute in bf16 on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
