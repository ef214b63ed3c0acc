"""Freed memory is reused without new page faults. In a process of its own: the setting cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from spikingbrain_train.runtime.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    before = faults()
    blocks = [torch.ones(mebibytes << 18) for mebibytes in (40, 10, 30, 20)]
    del blocks
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again() -> None:
    def faults_once_warm(mode: str) -> int:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    # Where blocks come to lie differs from process to process, and one at an odd place may need new pages.
    default, kept = (min(faults_once_warm(mode) for _ in range(3)) for mode in ("default", "keep"))
    assert kept < default / 2
