"""The clock by which a file system dates its files. That of this machine may differ, or have jumped."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path


def file_system_time(folder: Path) -> float:
    """Seconds since 1970 by the clock that dates files in ``folder``; this one's if none can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:  # it has no name, or loses it at once
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()
