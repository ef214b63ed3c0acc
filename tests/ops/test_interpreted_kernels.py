"""fla's Triton kernels, as our ops and exports call them, in Triton's interpreter against the recurrences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.interpreted_kernels import CASES

ROOT = Path(__file__).parents[2]
KERNELS = Path(f"{sys.prefix}-kernels")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (KERNELS / "triton").is_dir(),
        reason=f"there is no Triton in {KERNELS}: `make kernels` installs it",
    ),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Of every case by name, from one process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(KERNELS), str(ROOT)))}
    command = [sys.executable, str(ROOT / "tests/ops/interpreted_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_the_recurrence_does(name: str, errors: dict[str, dict[str, float]]) -> None:
    # Float32 rounds to 6e-8, and sums over a chunk of 64 tokens to a few times that. Where gates forget
    # everything fla takes differences of sums up to 100 a token, which leaves 1e-5. Float16 rounds to 5e-4.
    # Not <=: an error that is no number is one, too.
    bound = 1e-4 if CASES[name].dtype.itemsize == 4 else 5e-3
    assert all(error <= bound for error in errors[name].values()), errors[name]
