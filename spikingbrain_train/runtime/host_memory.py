"""Lets a training process on CPU reuse the memory that it frees.

Every step allocates the same activations and gradients again. glibc hands large blocks back to the kernel
when they are freed, and the kernel clears and maps each page anew the next time: more than 100,000 page
faults in a step of a 135M model at 2048 tokens, 5 to 15 percent of its time. Kept blocks cost no memory at
the peak, which every step reaches again.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = -1
_GROW_BY = 64 << 20


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the life of this process.

    Returns:
        Whether it could: only glibc is asked; elsewhere nothing changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROW_BY))
    return all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])
