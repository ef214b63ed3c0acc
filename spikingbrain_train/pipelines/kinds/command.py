"""Any command: what no other kind does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.kinds.kind import Context, StepKind, stamp
from spikingbrain_train.pipelines.steps import OWN, Step, own_command


class Command(StepKind):
    """``command`` is a list of words.

    The first may be ``python`` or a command of this project (``spikingbrain-plot``). It is done when the
    files and folders that ``outputs`` names exist. ``reads`` lists files whose change makes it run again.
    """

    name = "command"
    title = "run a command"

    def settings(self) -> Mapping[str, bool]:
        return {"command": True, "outputs": True, "reads": False}

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        command, outputs, reads = given["command"], given["outputs"], given.get("reads") or []
        if not isinstance(command, list) or not command:
            raise ConfigurationError("command must be a list of words, e.g. [python, my_script.py]")
        if not isinstance(outputs, Mapping) or not outputs:
            raise ConfigurationError("outputs must name what the command writes, e.g. {picture: loss.png}")
        if not isinstance(reads, list):
            raise ConfigurationError("reads must be a list of files and folders")
        words = [str(word) for word in command]
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0].startswith(OWN):
            # By its module: an environment that nobody activated has no such program on its path.
            words[:1] = own_command(words[0].removeprefix(OWN))
        makes = [Path(str(path)) for path in outputs.values()]
        given_files = [str(path) for path in reads if context.maker(str(path)) is None]
        return Step(
            context.name,
            f"run {Path(str(command[0])).name}",
            words,
            outputs={name: str(path) for name, path in outputs.items()},
            makes=makes,
            proof=makes,
            fingerprint=stamp(given_files),
            reads={f"reads[{number}]": str(path) for number, path in enumerate(reads)},
        )
