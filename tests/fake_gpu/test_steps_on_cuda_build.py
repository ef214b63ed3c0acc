"""The same steps where torch is built for CUDA and checks devices and shapes itself: see cuda_build.py.

`make cuda-build` installs that torch; without it this skips. .ci/run does not: it is 5 GB large.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fake_gpu.test_steps_on_fake_cuda import ROOT, RUNS, check_run, taken_steps, wide

TORCH = Path(os.environ.get("CUDA_BUILD", ROOT / ".venv-cuda"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (TORCH / ".installed").exists(),
    reason="torch's CUDA build is not installed; `make cuda-build` does it",
)
def test_torchs_cuda_build_has_no_more_to_say_of_any_step() -> None:
    steps = taken_steps(RUNS, torch_folder=TORCH, timeout=1770)
    for run in RUNS:
        check_run(run, steps)
    # What the meta device has no fused form of is fused here.
    assert not [place for found in steps.values() for place in wide(found) if "torch_sdpa" in place]
