"""How a check ends that somebody ends, or whose rank hangs: nothing is left behind, nobody waits for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from spikingbrain_train.health import probe_files

ROOT = Path(__file__).parents[2]


def test_a_check_that_is_ended_by_a_signal_leaves_no_file(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    left = tmp_path / f"{probe_files.PREFIX}of-yesterday"
    left.touch()
    os.utime(left, (time.time() - 86400,) * 2)
    with subprocess.Popen(
        [sys.executable, "-m", "spikingbrain_train", "health-check"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    ) as check:
        deadline = time.monotonic() + 60
        # Its token; a probe is there for a moment only. What a killed check has left goes.
        while not (found := list(tmp_path.glob(".health-check-*"))) or left in found or len(found) > 1:
            assert check.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        check.terminate()
    assert check.returncode == -signal.SIGTERM and list(tmp_path.iterdir()) == []


def test_a_rank_whose_driver_does_not_answer_ends_with_its_stack(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from spikingbrain_train.health import check\n"
        "from spikingbrain_train.planning.launch import Launch\n"
        "def driver_hangs(*_): time.sleep(60)\n"
        "check.rank_facts = driver_hangs\n"
        "check.check_health(Launch(), check.Need, check.Limits(), seconds=0.5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1 and "in driver_hangs" in done.stderr
