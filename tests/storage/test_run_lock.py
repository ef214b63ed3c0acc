"""Two runs never share an output_dir, and a killed one does not block the next."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage import run_lock as run_lock_module
from spikingbrain_train.storage.run_lock import LOCK_FILE, check_not_in_use, run_lock

HOLD = """
import sys
from spikingbrain_train.storage.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _other_run(folder: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with _other_run(tmp_path) as first, pytest.raises(ConfigurationError) as refusal, run_lock(tmp_path):
        pytest.fail("two runs hold the lock")
    sentence = str(refusal.value)
    assert f"output_dir={tmp_path} is in use" in sentence
    assert f"process {first.pid} on {socket.gethostname()}, started 20" in sentence


def test_a_second_run_is_refused_before_anything_is_imported_too(tmp_path: Path) -> None:
    check_not_in_use(tmp_path)
    with _other_run(tmp_path) as first:
        with pytest.raises(ConfigurationError, match=f"process {first.pid}"):
            check_not_in_use(tmp_path)
        first.kill()
        first.wait()
        check_not_in_use(tmp_path)
    _lock_of(tmp_path)
    with pytest.raises(ConfigurationError, match="node17"):
        check_not_in_use(tmp_path)


def test_a_killed_run_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    with _other_run(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / LOCK_FILE).is_file()
        with run_lock(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_run_that_ends_lets_the_next_one_in(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with run_lock(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(ZeroDivisionError), run_lock(folder):
        raise ZeroDivisionError
    with run_lock(folder):
        pass


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def _lock_of(folder: Path, **changes: object) -> None:
    holder = {
        "host": "node17",
        "pid": 4711,
        "started": "2026-11-26 03:00:00",
        "process_started": "99",
        "slurm_job": "",
    }
    (folder / LOCK_FILE).write_text(json.dumps(holder | changes))


def test_a_run_on_another_machine_is_named_with_the_file_to_remove(tmp_path: Path) -> None:
    _lock_of(tmp_path)
    with pytest.raises(ConfigurationError) as refusal, run_lock(tmp_path):
        pytest.fail("nobody knows whether that run still lives")
    sentence = str(refusal.value)
    assert "process 4711 on node17, started 2026-11-26 03:00:00" in sentence
    assert sentence.endswith(f"if that run has ended, remove {tmp_path / LOCK_FILE}.")
    assert (tmp_path / LOCK_FILE).exists()


def test_a_requeued_slurm_job_takes_over_what_it_left_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lock_of(tmp_path, slurm_job="31")
    monkeypatch.setenv("SLURM_JOB_ID", "32")
    with pytest.raises(ConfigurationError, match="Slurm job 31"), run_lock(tmp_path):
        pytest.fail("another job may still run")
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    with run_lock(tmp_path):
        pass


def test_a_run_on_another_machine_that_shows_no_life_for_ten_minutes_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a container leaves it that was killed and is started again under a new name."""
    _lock_of(tmp_path)
    file = tmp_path / LOCK_FILE
    os.utime(file, (time.time() - 250, time.time() - 250))
    for attempt in (lambda: check_not_in_use(tmp_path), lambda: run_lock(tmp_path).__enter__()):
        with pytest.raises(ConfigurationError, match=r"start again in 6 minute\(s\)"):
            attempt()
    # What counts is the clock of the file system: that of this machine may have jumped.
    day_ahead = mock.patch.object(time, "time", return_value=time.time() + 86400)
    with day_ahead, pytest.raises(ConfigurationError, match=r"start again in 6 minute\(s\)"):
        check_not_in_use(tmp_path)
    os.utime(file, (time.time() - 601, time.time() - 601))
    check_not_in_use(tmp_path)
    with run_lock(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert "was left by a run on another machine (process 4711 on node17" in capsys.readouterr().out


def test_a_run_shows_that_it_lives_as_long_as_it_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock_module, "TOUCH_SECONDS", 0.01)
    file = tmp_path / LOCK_FILE
    with run_lock(tmp_path):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > time.time() - 60


def test_a_run_that_was_given_up_too_early_leaves_the_lock_to_its_successor(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        _lock_of(tmp_path)  # as one writes it on a machine that sees no locks of this one
    assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "node17"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}'])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with run_lock(tmp_path):
        pass


class TestFileSystemsWithoutLocks:
    """The process number decides there."""

    @pytest.fixture(autouse=True)
    def _without_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)

    def test_a_live_process_is_refused(self, tmp_path: Path) -> None:
        with (
            _other_run(tmp_path) as first,
            pytest.raises(ConfigurationError, match=f"process {first.pid}"),
            run_lock(tmp_path),
        ):
            pytest.fail("two runs hold the lock")

    def test_a_dead_process_is_not(self, tmp_path: Path) -> None:
        with _other_run(tmp_path) as first:
            first.kill()
            first.wait()
            with run_lock(tmp_path):
                pass

    def test_nor_is_a_later_process_with_its_number(self, tmp_path: Path) -> None:
        _lock_of(tmp_path, host=socket.gethostname(), pid=os.getppid(), process_started="1")
        with run_lock(tmp_path):
            pass
