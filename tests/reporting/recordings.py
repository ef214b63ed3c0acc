"""Folders of runs as training writes them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spikingbrain_train.reporting.metrics import METRICS_FILE

TEXT = {"text": {"tokens": 900, "fingerprint": "aaaa"}}
OTHER_TEXT = {"text": {"tokens": 900, "fingerprint": "bbbb"}}
TOKENS = 100
"""Of a step."""


def write_run(
    folder: Path,
    losses: Sequence[float | None] = (5.0, 4.5, 4.0),
    *,
    stage: str = "cpt",
    load: Path | str | None = None,
    held_out: Mapping[str, Any] = TEXT,
    valid: Mapping[int, float | None] | None = None,
    metrics: Mapping[str, Any] | None = None,
    resumed: Mapping[int, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    has_events: bool = True,
) -> Path:
    """A run that reported every ten steps, and evaluated before the first and after the last.

    Args:
        folder: its output_dir.
        losses: its reports' train/loss.
        stage: its kind.
        load: the checkpoint that it started from.
        held_out: what it evaluated on.
        valid: iteration -> held-out cross entropy; by default 6 and 4.
        metrics: further metrics of each report; a list has one value for each.
        resumed: iteration -> what had changed.
        settings: run_config.yaml of its checkpoint; None is no checkpoint.
        has_events: whether it was written since there are event lines.
    """
    folder.mkdir(parents=True)
    last = 10 * len(losses)
    valid = {0: 6.0, last: 4.0} if valid is None else valid
    facts = {
        "output_dir": str(folder.resolve()),
        "stage": stage,
        "load": None if load is None else str(load),
        "held_out": held_out,
        "seq_length": 32,
        "world_size": 1,
    }
    time = 1_000_000.0
    lines: list[dict[str, Any]] = []
    if has_events:
        lines.append({"iteration": 0, "time": time, "event": "started", "run": facts})
    if 0 in valid:
        lines.append({"iteration": 0, "time": time, "valid/cross_entropy": valid[0]})
    for number, loss in enumerate(losses):
        iteration = 10 * (number + 1)
        time += 3600.0
        point: dict[str, Any] = {"iteration": iteration, "time": time, "train/loss": loss}
        point["train/tokens"] = float(TOKENS * iteration)
        point["align/error" if stage == "align" else "train/cross_entropy"] = loss
        for name, values in (metrics or {}).items():
            point[name] = values[number] if isinstance(values, tuple) else values
        lines.append(point)
        if iteration in valid:
            lines.append({"iteration": iteration, "time": time, "valid/cross_entropy": valid[iteration]})
        if resumed and iteration in resumed:
            time += 36_000.0
            event = {"iteration": iteration, "time": time, "event": "resumed", "run": facts}
            lines.append({**event, "changed": resumed[iteration]})
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings is not None:
        checkpoint = folder / "checkpoints" / f"iter_{last:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run_config.yaml").write_text(yaml.safe_dump(dict(settings)))
        (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text(f"{last}\n")
    return folder


def checkpoint_of(folder: Path, iteration: int = 30) -> Path:
    """Where a run wrote an iteration."""
    return folder.resolve() / "checkpoints" / f"iter_{iteration:07d}"
