"""What a killed process leaves behind goes away; what a living one works in stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from spikingbrain_train.storage import temporary_folder as module
from spikingbrain_train.storage.temporary_folder import remove_abandoned, temporary_folder

WORKER = """
import sys, time
from pathlib import Path
from spikingbrain_train.storage.temporary_folder import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print(folder, flush=True)
    time.sleep(60)
"""


@contextmanager
def worker(target: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that works in a temporary folder, and that folder."""
    command = [sys.executable, "-c", WORKER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.fixture
def dead() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_is_gone_in_the_end_also_after_an_error(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "out") as folder:
        assert folder.name == f"out.tmp-{os.getpid()}"
    with pytest.raises(RuntimeError), temporary_folder(tmp_path / "out") as folder:
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_living_process_keeps_its_folder_and_a_killed_one_loses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with worker(tmp_path / "out") as (process, folder):
        remove_abandoned(tmp_path / "out")
        with temporary_folder(tmp_path / "out") as ours:
            assert folder.is_dir() and ours != folder
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert folder.is_dir()
        remove_abandoned(tmp_path / "other")
        assert folder.is_dir()
        remove_abandoned(tmp_path / "out")
        assert not folder.exists()
    assert f"{folder}, which a killed call had left, is removed" in caplog.text


def test_a_folder_whose_maker_said_nothing_goes_by_its_process_id(tmp_path: Path, dead: int) -> None:
    """Made by an earlier release, or killed in the first instant."""
    with worker(tmp_path / "unrelated") as (process, _):
        names = {
            f"out.tmp-{dead}": False,
            f"out.tmp-{process.pid}": True,
            "out.tmp-x": True,
            "out.tmp-1x": True,
        }
        for name in names:
            (tmp_path / name).mkdir()
        remove_abandoned(tmp_path / "out")
        assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_process_id_that_is_in_use_again_does_not_keep_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / f"out.tmp-{os.getpid()}"
    folder.mkdir()
    (folder / ".owner").write_text(json.dumps({"host": module.socket.gethostname(), "pid": os.getpid()}))
    remove_abandoned(tmp_path / "out")
    assert not folder.exists()


def test_a_folder_of_another_machine_goes_only_when_it_has_been_quiet(tmp_path: Path, dead: int) -> None:
    """Not every file system shares locks between machines."""
    folder = tmp_path / f"out.tmp-{dead}"
    folder.mkdir()
    (folder / ".owner").write_text(json.dumps({"host": "elsewhere", "pid": dead}))
    # Quiet by the clock of the file system: that of this machine may have jumped.
    with mock.patch.object(time, "time", return_value=time.time() + 86400):
        remove_abandoned(tmp_path / "out")
    assert folder.exists()
    long_ago = time.time() - 7200
    for path in (folder / ".owner", folder):
        os.utime(path, (long_ago, long_ago))
    remove_abandoned(tmp_path / "out")
    assert not folder.exists()


def test_what_was_moved_aside_goes_back_when_nothing_took_its_place(tmp_path: Path, dead: int) -> None:
    (tmp_path / f"out.tmp-{dead}/old").mkdir(parents=True)
    (tmp_path / f"out.tmp-{dead}/old/weights").write_text("the earlier result")
    remove_abandoned(tmp_path / "out")
    assert (tmp_path / "out/weights").read_text() == "the earlier result"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_left_alone(tmp_path: Path, dead: int) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / f"out.tmp-{dead}").symlink_to(tmp_path / "precious")
    remove_abandoned(tmp_path / "out")
    assert (tmp_path / "precious").is_dir()
