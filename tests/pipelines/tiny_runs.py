"""Published pipelines that run to their end on a tiny model and a few documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.programs import Programs


def run_to_its_end(
    programs: Programs, name: str, arguments: Sequence[str], folder: Path, *, steps: int
) -> None:
    """In a folder that has the source, on text.jsonl, which it makes there.

    Args:
        programs: run it.
        name: of the pipeline.
        arguments: behind the name.
        folder: where it runs.
        steps: that it has.
    """
    documents = [json.dumps({"text": topics[each]}) for each in sorted(topics)[:12]]
    (folder / "text.jsonl").write_text("\n".join(documents))
    run = programs.run(("-m", "spikingbrain_train", "pipeline", "run", name, *arguments), folder)
    assert run.code == 0 and f"all {steps} steps are done" in run.said, run.said[-3000:]


def read(path: Path) -> dict[str, Any]:
    """A result, JSON."""
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found
