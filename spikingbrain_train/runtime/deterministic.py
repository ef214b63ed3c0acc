"""Equal bits for equal inputs: what torch and the libraries below it have to be told, and when.

Which of our kernels give them, their tables say (``Backend.varies``); megatron-core is told with the model
(models/transformer_config.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType

import torch

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime.mkl import sums_in_one_order

VARIABLES = MappingProxyType(
    {
        "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
        "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
        "MKL_CBWR": ("AUTO,STRICT", "AVX2,STRICT", "AVX512,STRICT", "COMPATIBLE"),
    }
)
"""Variable -> the values with which it sums in one order; the first where nobody has set it.

cuBLAS has several workspaces and takes any; NCCL chooses an algorithm by what it measures (the values are
those that Megatron-LM allows); Transformer Engine's attention adds with atomics; MKL's products depend on
where in memory matrices lie."""

_NO_DETERMINISTIC_FORM = "does not have a deterministic implementation"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """While the body runs, equal inputs give equal bits; nothing happens where that is not ``wanted``.

    Entered before process groups are formed and anything is multiplied: libraries read their variables once.

    Raises:
        PlatformError: a variable says otherwise, this process has multiplied before MKL was told, or the body
            needs something of which torch has no such form.
    """
    if not wanted:
        yield
        return
    for name, values in VARIABLES.items():
        if (value := os.environ.get(name, values[0])) not in values:
            raise PlatformError(
                f"numerics.deterministic=true needs {name} to be one of {', '.join(values)}, but it is "
                f"{value}; unset it"
            )
    before = {name: os.environ.get(name) for name in VARIABLES}
    was_on, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    was_cudnn = (cudnn.deterministic, cudnn.benchmark)
    os.environ.update({name: before[name] or values[0] for name, values in VARIABLES.items()})
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        if sums_in_one_order() is False:
            raise PlatformError(
                "numerics.deterministic=true, but this process has multiplied matrices before, when MKL_CBWR "
                "was not set, and MKL reads it once: the run would have other last bits than in a process of "
                f"its own; set MKL_CBWR={VARIABLES['MKL_CBWR'][0]} before this one starts"
            )
        yield
    except RuntimeError as error:
        if _NO_DETERMINISTIC_FORM not in str(error):
            raise
        raise PlatformError(
            f"numerics.deterministic=true, but {str(error).splitlines()[0].partition('.')[0]}; choose other "
            "kernels (cluster.kernels), or set it to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(was_on)
        cudnn.deterministic, cudnn.benchmark = was_cudnn
        for name, earlier in before.items():
            if earlier is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = earlier
