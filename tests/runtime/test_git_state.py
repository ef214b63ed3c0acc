"""What is written down of the code is what git says of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from spikingbrain_train.runtime.git_state import git_state


def test_a_checkout_is_described_by_its_commit_and_what_differs(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None, "no checkout"

    def git(*arguments: str) -> str:
        person = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", "-C", str(tmp_path), *person, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "main")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None
    assert (state.commit, state.branch, state.changed_files) == (git("rev-parse", "HEAD"), "main", [])
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "unknown.py").write_text("2")
    changed = git_state(tmp_path)
    assert changed is not None and changed.changed_files == ["a.py"]
    assert changed.describe() == f"code: commit {state.commit} on main, 1 file changed"
