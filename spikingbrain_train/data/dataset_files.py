"""The files that make up an indexed dataset. Asked for before torch is there."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".bin", ".idx", ".json")
"""The files of one dataset, in the order in which they are put in place."""


def existing_files(prefix: str | Path) -> list[str]:
    """Files of a dataset that already lie at ``prefix``."""
    return [f"{prefix}{suffix}" for suffix in SUFFIXES if os.path.exists(f"{prefix}{suffix}")]
