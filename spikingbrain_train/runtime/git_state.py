"""Which code a run is of, where it runs from a git checkout."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_CODE = Path(__file__).resolve().parents[2]
_SECONDS = 10.0


@dataclass(frozen=True)
class GitState:
    """A checkout as it lies there."""

    commit: str
    branch: str
    """Empty where no branch is checked out."""
    changed_files: list[str]
    """Paths that differ from the commit; files that git does not know are left out."""

    def describe(self) -> str:
        """``code: commit 0123abcd on main, 2 files changed``, for run_details.txt."""
        where = f" on {self.branch}" if self.branch else ""
        count = len(self.changed_files)
        changed = f"{count} file{'' if count == 1 else 's'} changed" if count else "nothing changed"
        return f"code: commit {self.commit}{where}, {changed}"


def git_state(folder: Path = _CODE) -> GitState | None:
    """The state of the checkout whose root is ``folder``, of this package by default.

    Returns:
        None where it is none (an installed package), or git is missing or does not answer.
    """
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "diff", "--name-only", "HEAD")
    if commit is None or changed is None:
        return None
    return GitState(commit, _git(folder, "branch", "--show-current") or "", changed.splitlines())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
