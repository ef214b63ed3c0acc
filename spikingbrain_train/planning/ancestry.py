"""What a checkpoint was made from, as its folders say: one step back. Without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.reporting.metrics import read_events
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, CONVERSION_REPORT_FILE


def loaded_checkpoint(checkpoint: Path, run: RunConfig) -> Path | None:
    """The checkpoint that the run started from: the one it wrote down, else what its setting names now."""
    if run.checkpoint.load is None:
        return None
    output = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINT_FOLDER else checkpoint.parent
    for path in _written_down(output):
        if path.is_dir():
            return path
    return _from_where_it_ran(Path(run.checkpoint.load), run, output)


def _written_down(output: Path) -> Iterator[Path]:
    try:
        for event in read_events(output):
            load = (event.get("run") or {}).get("load")
            if event.get("event") == "started" and isinstance(load, str):
                yield Path(load)
    except (SpikingBrainError, OSError):
        return


def _from_where_it_ran(path: Path, run: RunConfig, output: Path) -> Path:
    """A relative path means the folder in which the run was started, of which its output_dir tells."""
    if path.is_absolute() or path.exists():
        return path
    here, said = output.resolve(), Path(run.output_dir)
    if not said.is_absolute() and here.parts[-len(said.parts) :] == said.parts:
        moved = Path(*here.parts[: len(here.parts) - len(said.parts)]) / path
        if moved.exists():
            return Path(os.path.relpath(moved))
    return path


def conversion_report(folder: Path) -> dict[str, object]:
    """What a conversion said of itself."""
    try:
        found = json.loads((folder / CONVERSION_REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
