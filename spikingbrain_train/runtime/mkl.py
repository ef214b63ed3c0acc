"""How MKL, which multiplies matrices on CPUs, adds up: in one order, or in one that depends on addresses.

MKL reads ``MKL_CBWR`` once in the life of a process, at its first product, and refuses to be told later
(``mkl_cbwr_set`` fails then). Without it the last bits of a product depend on where in memory its matrices
lie, and are other ones than with it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_GETTERS = ("mkl_serv_cbwr_get", "mkl_cbwr_get", "MKL_CBWR_Get")
"""MKL's question for its mode: where it is linked into torch, and where it is a library of its own."""
_ALL = -1
_COMPATIBLE, _STRICT = 3, 1 << 16
"""From mkl_service.h: the branch in which addresses never change a sum, and the flag of the others."""


def sums_in_one_order() -> bool | None:
    """Whether equal matrices have equal products, wherever they lie, for the rest of this process.

    MKL takes what ``MKL_CBWR`` says now, unless it has multiplied, or was asked, before.

    Returns:
        None where torch does not multiply with MKL.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    torchs = ctypes.CDLL(str(library))
    for name in _GETTERS:
        if hasattr(torchs, name):
            mode = int(getattr(torchs, name)(_ALL))
            return bool(mode & _STRICT) or mode == _COMPATIBLE
    return None
