"""What a run says and writes down at its beginning: its data, its weights, and what has changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import fingerprint
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.evaluation.evaluator import HeldOutData
from spikingbrain_train.planning.resume import (
    Change,
    StoredRun,
    changes_since,
    is_same_topology,
    nothing_left,
)
from spikingbrain_train.reporting.metrics import RESUMED, STARTED
from spikingbrain_train.storage.checkpoint_folder import iteration_of, latest_checkpoint
from spikingbrain_train.training.optimizer import learning_rate_at


@dataclass(frozen=True)
class HeldOutSet:
    """What an evaluation reads of a held-out dataset, so that two runs can be told to have read the same."""

    tokens: int
    """Predicted in one evaluation."""
    fingerprint: str
    """Of the dataset's files, whatever path they have; see config/run_record.py."""


@dataclass(frozen=True)
class Facts:
    """What belongs to the points of a run and is none of them."""

    output_dir: str
    """Absolute."""
    stage: str
    """``stage.kind``."""
    load: str | None
    """Absolute folder (``iter_...``) of the checkpoint that its first weights are from; None: random ones."""
    held_out: dict[str, HeldOutSet]
    """By name; empty without ``data.valid``."""
    seq_length: int
    world_size: int


@dataclass(frozen=True)
class Beginning:
    """The start of a run or of its continuation."""

    iteration: int
    """Steps done before it."""
    facts: Facts
    rows: list[tuple[str, str]]
    """For the user: names and what is to be said of each."""
    changes: list[Change] | None = None
    """Settings that differ from the checkpoint's; None where the run starts."""

    @property
    def is_start(self) -> bool:
        """Whether the run starts, and does not go on."""
        return self.changes is None

    @property
    def name(self) -> str:
        """Of its event in the metrics file."""
        return STARTED if self.is_start else RESUMED

    def event(self) -> dict[str, Any]:
        """As it stands in the metrics file, but for its time."""
        event = {"iteration": self.iteration, "event": self.name, "run": asdict(self.facts)}
        if self.changes is not None:
            event["changed"] = {each.name: [_plain(each.was), _plain(each.now)] for each in self.changes}
        return event


def facts_of(config: RunConfig, world_size: int, held_out: HeldOutData | None) -> Facts:
    """The facts of a run. Raises DataError where a held-out dataset cannot be read."""
    datasets = () if held_out is None else held_out.datasets
    return Facts(
        output_dir=str(Path(config.output_dir).resolve()),
        stage=config.stage.kind,
        load=_loaded_folder(config),
        held_out={
            each.name: HeldOutSet(each.tokens, fingerprint(each.prefix).digest)
            for each in datasets
            if each.tokens > 0  # else no evaluation gets as far
        },
        seq_length=config.stage.seq_length,
        world_size=world_size,
    )


def _loaded_folder(config: RunConfig) -> str | None:
    load = config.checkpoint.load
    if load is None:
        return None
    try:
        return str(latest_checkpoint(load, "checkpoint.load").resolve())
    except SpikingBrainError:  # a run that goes on needs it no more
        return str(Path(load).resolve())


def started(config: RunConfig, facts: Facts) -> Beginning:
    """The beginning of a run that starts at iteration 0."""
    load = config.checkpoint.load
    if load is None:
        weights = f"random, from seed={config.seed}"
    else:
        iteration = iteration_of(latest_checkpoint(load, "checkpoint.load"))
        weights = f"of {load} at iteration {iteration}; optimizer, schedule and data order start anew"
    return Beginning(0, facts, [("weights", weights)])


def resumed(stored: StoredRun, config: RunConfig, consumed_samples: int, facts: Facts) -> Beginning:
    """The beginning of a run that goes on: where, what it brings along, and what has changed since.

    Args:
        stored: the run as it was.
        config: the run as it goes on.
        consumed_samples: sequences that it has read.
        facts: of the run as it goes on.
    """
    brought = "weights, optimizer, schedule and position in the data"
    fresh = ""
    if is_same_topology(stored, config, facts.world_size):
        brought = f"{brought.replace(' and ', ', ')} and random generators"
    else:
        fresh = "; random generators start anew, for another layout of ranks"
    rows = [
        (
            "resumed",
            f"from {stored.checkpoint} at iteration {stored.iteration} with its {brought} "
            f"({consumed_samples:,} sequences read){fresh}",
        )
    ]
    changes = changes_since(stored, config, facts.world_size)
    said = [change.describe() for change in changes] + _changed_rates(stored, config)
    rows.append(("changed", f"since the checkpoint: {', '.join(said) if said else 'nothing'}"))
    if done := nothing_left(config, stored):
        rows.append(("finished", done))
    return Beginning(stored.iteration, facts, rows, changes)


def _changed_rates(stored: StoredRun, config: RunConfig) -> list[str]:
    """What the changes make of the learning rate of the next step; a longer schedule lifts it, too."""
    step = stored.iteration + 1
    if step > config.stage.train_iters:
        return []
    before, after = (
        learning_rate_at(step, each.optimizer, each.stage.train_iters) for each in (stored.config, config)
    )
    if before == after:
        return []
    return [f"so that the learning rate of step {step} is {after:.3g} instead of {before:.3g}"]


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
