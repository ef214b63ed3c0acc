"""How loader processes end: with their parent, and with nobody else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spikingbrain_train.data.loader import WholeBatch, build_data_loader
from spikingbrain_train.errors import DataError

_FAILING_RUN = """
from tests.data.test_loader_processes import loader_with_processes

def train():
    loader = loader_with_processes()
    next(loader)
    raise RuntimeError("the step failed")

train()
"""


class _Zeros(torch.utils.data.Dataset):
    def __init__(self, broken_from: int) -> None:
        self.broken_from = broken_from

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.broken_from:
            raise DataError(f"sample {index} is broken")
        tokens = torch.zeros(4, dtype=torch.int64)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(4)}


def loader_with_processes(broken_from: int = 64) -> Iterator[WholeBatch]:
    """64 batches from two processes."""
    return build_data_loader(
        _Zeros(broken_from),  # type: ignore[arg-type]
        consumed_samples=0,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=2,
    )


def test_a_rank_that_fails_ends_although_its_loader_has_processes() -> None:
    """An error nobody catches keeps the loader until the interpreter has stopped, which waits for its
    children."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", _FAILING_RUN],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: the step failed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_leaves_the_loader_working(number: signal.Signals) -> None:
    before = multiprocessing.active_children()
    loader = loader_with_processes()
    next(loader)
    workers = [str(child.pid) for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    # Sent by another process than their parent, as a launcher or a terminal does.
    subprocess.run(["kill", f"-{number.value}", *workers], check=True)
    assert len(list(loader)) == 63


def test_no_process_is_left_of_a_loader_that_failed_while_its_error_is_kept() -> None:
    before = multiprocessing.active_children()
    loader = loader_with_processes(broken_from=4)
    with pytest.raises(DataError, match="^sample 4 is broken$") as kept:
        list(loader)
    assert multiprocessing.active_children() == before
    assert isinstance(kept.value.__cause__, DataError)  # with the traceback of the process, as text
