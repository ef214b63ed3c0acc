"""What the commands of this room write: text as it comes, and results as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from spikingbrain_train.storage.durable_files import write_text_durably


def show_text(text: str) -> None:
    """Write a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_result(path: Path, result: Any) -> None:
    """Write a result, its folder included; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
