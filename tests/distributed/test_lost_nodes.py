"""A node of two that is lost: a new one takes its place under torchrun, or the other one ends."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from spikingbrain_train.reporting.metrics import read_events
from tests.distributed.forked_launch import ForkedLaunch
from tests.distributed.interrupted_runs import settings


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_a_new_node_takes_the_place_of_a_lost_one_and_without_the_first_the_other_ends(
    tmp_path: Path, text: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = settings(
        tmp_path / "run", text, steps=100000, save_interval=2, more=["cluster.timeout_minutes=0.5"]
    )

    def node(number: int) -> ForkedLaunch:
        meeting = [
            *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=run", f"--rdzv-endpoint=127.0.0.1:{port}"),
            # An agent whose store is gone looks for it no longer than that.
            f"--rdzv-conf=is_host={int(number == 0)},join_timeout=120,read_timeout=15",
        ]
        log = tmp_path / f"log_{number}"
        # Else the agent that stays hands its first store on to no one who comes later (torch 2.13).
        anew = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return ForkedLaunch(tmp_path / "run", log, 1, words, restarts=2, meeting=meeting, variables=anew)

    with node(0) as first, node(1) as second:
        assert first.wait_for(lambda: first.iteration() >= 3), first.tail()
        second.kill()
        with node(2) as replacement:
            assert first.wait_for(lambda: len(read_events(first.output)) == 2), first.tail()
            _, resumed = read_events(first.output)
            assert first.wait_for(lambda: first.iteration() >= resumed["iteration"] + 2), first.tail()
            assert "rank 1 of 2 did not answer in the step after iteration" in first.log.read_text()

            first.kill()  # and with it the store at which all meet
            replacement.process.wait(100)
            errors = [line for line in replacement.log.read_text().splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, replacement.tail()
            assert "does not answer after iteration" in errors[0] and "start again" in errors[0]
