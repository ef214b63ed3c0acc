"""What every kind of step says: which settings it has, and which command they make."""

from __future__ import annotations

import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.data.folders import LeftOut, files_below
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.references import did_you_mean
from spikingbrain_train.pipelines.steps import Step

COMMON = ("kind", "title", "sbatch")
"""Settings of every step."""


@dataclass(frozen=True)
class Context:
    """Where a step stands."""

    name: str
    output: Path
    """Folder of the pipeline."""
    steps: Mapping[str, Step]
    """Those that come before it."""
    unknown: frozenset[str] = frozenset()
    """What stands for the variables that have no value yet: a dry run goes on without them."""

    def is_known(self, value: Any) -> bool:
        """Whether no part of ``value`` waits for a variable."""
        return not any(word in str(value) for word in self.unknown)

    def maker(self, path: str) -> Step | None:
        """The step before this one that makes ``path``, or a folder around it."""
        wanted = Path(path)
        for step in self.steps.values():
            if not step.command:
                continue
            for made in [*step.makes, *(Path(str(output)) for output in step.outputs.values())]:
                if wanted == made or made in wanted.parents:
                    return step
        return None


def given_ranks(context: Context, given: Mapping[str, Any]) -> int | None:
    """The step's ``nproc_per_node``; None where it has none, or its value waits for a variable.

    Raises:
        ConfigurationError: it is no number of ranks.
    """
    ranks = given.get("nproc_per_node")
    if ranks is None or not context.is_known(ranks):
        return None
    if type(ranks) is not int or ranks < 1:
        raise ConfigurationError(f"nproc_per_node={ranks} must be a whole number of at least 1")
    return ranks


def dataset(setting: str, prefixes: Iterable[Any]) -> dict[str, str]:
    """The files of datasets, for :attr:`Step.reads`."""
    return {f"{setting}[{number}]": f"{prefix}.bin" for number, prefix in enumerate(prefixes)}


class StepKind(ABC):
    """A kind of step."""

    name: str
    """How a YAML calls it."""
    title: str = ""
    """What its command does, in a few words; a step may say it better."""

    @abstractmethod
    def settings(self) -> Mapping[str, bool]:
        """Its settings -> whether a step must give them."""

    @abstractmethod
    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        """The step that the settings make.

        Args:
            context: where it stands.
            given: its settings, with every reference replaced.

        Raises:
            SpikingBrainError: what its command would refuse, as far as that can be said without torch.
        """

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise ConfigurationError where a setting is unknown or missing."""
        known = self.settings()
        for name in given:
            if name not in known and name not in COMMON:
                there = [*known, *COMMON]
                hint = did_you_mean(name, there) or ";"
                raise ConfigurationError(
                    f"{name} is not a setting of {self.name}{hint} there are {', '.join(there)}"
                )
        for name, needed in known.items():
            if needed and given.get(name) is None:
                raise ConfigurationError(f"{name} is missing, which every {self.name} needs")


def stamp(paths: Iterable[str]) -> str:
    """Names, sizes and times of a user's files, so that a changed input is noticed.

    Args:
        paths: files, folders and globs; what does not exist is left out.
    """
    marks = set()
    for name in paths:
        for path in map(Path, glob.glob(name, recursive=True)):
            for file in files_below(path, LeftOut()) if path.is_dir() else [path]:
                if file.is_file():
                    status = file.stat()
                    marks.add((str(file), status.st_size, status.st_mtime_ns))
    return json.dumps(sorted(marks))
