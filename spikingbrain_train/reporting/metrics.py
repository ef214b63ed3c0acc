"""The scalars that a run has written to its file of JSON lines.

Metric names are ``group/name``. Every run has ``train/loss``, ``train/learning_rate``, ``train/grad_norm``,
``train/tokens_per_second``, ``train/mfu`` (0-1), ``train/memory_gib`` and, with held-out data,
``valid/cross_entropy`` (nats per token). Callbacks add more: ``moe/...``
(:mod:`~spikingbrain_train.training.callbacks.expert_load`), ``spiking/...``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError

METRICS_FILE = "metrics.jsonl"


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The points of a run's metrics file, in the order they were written.

    A last line that a crash cut short is left out.

    Raises:
        DataError: there is no metrics file, or a line inside it is not a JSON object with an iteration.
    """
    path = Path(output_dir) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; name the output_dir of a run that has logged metrics."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    *complete, _unfinished = lines
    points = []
    for number, line in enumerate(complete, start=1):
        point = parse_point(line)
        if point is None:
            raise DataError(f"{path}, line {number} is not a metrics point; remove that line.")
        points.append(point)
    return points


def parse_point(line: str) -> dict[str, Any] | None:
    """The point of a line, None where the line is damaged."""
    try:
        point = json.loads(line)
    except ValueError:
        return None
    return point if isinstance(point, dict) and isinstance(point.get("iteration"), int) else None
