"""What answers questions about a run, and its user rarely needs: ``run_details.txt`` in output_dir."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spikingbrain_train.runtime.git_state import git_state

RUN_DETAILS_FILE = "run_details.txt"


def append_detail(output_dir: str | Path, line: str) -> None:
    """Write a line at the end of the file, from the main process. Raises OSError where that cannot be."""
    path = Path(output_dir) / RUN_DETAILS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def heading() -> str:
    """What a run begins its lines with: when, which version, where, how it was called."""
    try:
        release = version("spikingbrain-train")
    except PackageNotFoundError:  # run from its sources
        release = "not installed"
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    code = git_state()
    lines = [
        f"\n{now}: spikingbrain-train {release} on {platform.node()}",
        f"command: {shlex.join(sys.argv)}",
        *([] if code is None else [code.describe()]),
    ]
    return "\n".join(lines)
