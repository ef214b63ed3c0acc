"""One step of a pipeline: a command, what it makes, and how to see that it is done."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, latest_iteration


@dataclass(frozen=True)
class Step:
    """A step with everything that its command needs. Its kind makes it."""

    name: str
    title: str
    """What the command does, in a few words."""
    command: list[str]
    """Empty where there is nothing to do: the outputs are given."""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """What other steps may refer to: files and folders that it makes."""
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """Further outputs, whose values the step itself finds out and writes into ``values``; until it has, these
    are taken for them."""
    makes: list[Path] = field(default_factory=list)
    """Files and folders that belong to this step alone: cleared away before it is done anew."""
    proof: list[Path] = field(default_factory=list)
    """Files that exist once the step is complete; none of them is written before the end."""
    values: Path | None = None
    """JSON file among ``makes`` with a value for every name of ``assumed``."""
    fingerprint: str = ""
    """What the result depends on besides the command and the steps it needs."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """Setting -> file or folder that must exist before the pipeline starts, unless a step makes it."""
    recipe: ConversionConfig | None = None
    """Of the checkpoint that it converts, where that is known before it runs."""
    train_iters: int | None = None
    """For training: the iteration whose checkpoint completes the step. An interrupted one goes on by
    itself."""
    sbatch: Sequence[str] = ()
    """Options of sbatch for its job, where a pipeline is submitted to Slurm and the command has none."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Steps whose files it refers to -> their keys."""

    @property
    def key(self) -> str:
        """A digest of command, what it reads, and steps it needs; another one makes the result stale."""
        content = [self.name, portable(self.command), self.fingerprint, sorted(self.needs.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def is_complete(self) -> bool:
        """Whether the result lies there in full."""
        if self.train_iters is not None:
            return latest_iteration(self.makes[0] / CHECKPOINT_FOLDER) == self.train_iters
        return all(path.exists() for path in self.proof)

    def iteration(self) -> int | None:
        """How far a training step has come; None for others, and before its first checkpoint."""
        if self.train_iters is None:
            return None
        return latest_iteration(self.makes[0] / CHECKPOINT_FOLDER)

    def read_values(self) -> dict[str, Any]:
        """What the complete step has found out: a value for every name of ``assumed``.

        Raises:
            ConfigurationError: the file is damaged.
        """
        if self.values is None:
            return {}
        try:
            values = json.loads(self.values.read_text(encoding="utf-8"))
            return {name: values[name] for name in self.assumed}
        except (OSError, ValueError, TypeError, KeyError):
            raise ConfigurationError(
                f"{self.values} cannot be read; remove it, and the step {self.name} is done again"
            ) from None


OWN = "spikingbrain-"
"""How an installed package calls a command; ``python -m spikingbrain_train`` goes without it."""
_MODULE = "spikingbrain_train"


def own_command(*words: str) -> list[str]:
    """The words that run a command of this project with this interpreter, installed or not.

    Args:
        words: the command's name without ``spikingbrain-``, and its first arguments.
    """
    return [sys.executable, "-m", _MODULE, *words]


def portable(command: Sequence[str]) -> list[str]:
    """The command without the place of its interpreter: another environment leaves results valid."""
    return ["python" if word == sys.executable else word for word in command]


def printable(command: Sequence[str]) -> str:
    """The command as it can be pasted into a shell in the current folder."""
    here = Path.cwd()
    if list(command[:3]) == own_command():
        program = f"{OWN}{command[3]}"
        installed = Path(sys.executable).with_name(program)
        if installed.is_file():
            on_path = shutil.which(program)
            short = on_path is not None and Path(on_path) == installed
            command = [program if short else str(installed), *command[4:]]
    words = []
    for word in command:
        path = Path(word)
        # Not resolved: .venv/bin/python is a link to an interpreter without our packages.
        words.append(
            str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else word
        )
    return shlex.join(words)
