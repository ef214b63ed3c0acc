"""What is remembered of a pipeline's steps: ``pipeline_state.json`` in its output folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.slurm import Jobs
from spikingbrain_train.pipelines.steps import Step, portable
from spikingbrain_train.storage.durable_files import write_text_durably
from spikingbrain_train.storage.processes import ProcessName
from spikingbrain_train.storage.run_lock import LOCK_FILE

STATE_FILE = "pipeline_state.json"


@dataclass
class StepRecord:
    """What is remembered of a step that was begun."""

    key: str
    """:attr:`Step.key` of what was begun."""
    title: str = ""
    command: list[str] = field(default_factory=list)
    fingerprint: str = ""
    needs: dict[str, str] = field(default_factory=dict)
    """Keys of the steps that it built on."""
    seconds: float = 0.0
    """Wall time, over all attempts."""
    exit_code: int | None = None
    """Of the last attempt; None where that was cut off."""
    job: str = ""
    """Number of its Slurm job, where the pipeline was submitted."""
    process: ProcessName | None = None
    """What runs its command."""

    def __post_init__(self) -> None:
        """Take a process as the file has it."""
        if isinstance(self.process, dict):
            self.process = ProcessName(**self.process)

    @classmethod
    def of(cls, step: Step) -> StepRecord:
        """The record of a step that is about to begin."""
        return cls(step.key, step.title, list(step.command), step.fingerprint, dict(step.needs))


class State:
    """The records of the pipeline that fills a folder, in the order in which its steps run.

    Raises:
        ConfigurationError: the folder holds files that no pipeline made, or the record is damaged.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / STATE_FILE
        self.records: dict[str, StepRecord] = {}
        if output.exists() and not output.is_dir():
            raise ConfigurationError(f"output {output} is a file; choose a folder")
        if self.path.is_file():
            self.read()
        elif output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir()):
            raise ConfigurationError(
                f"output {output} is not empty and was not made by a pipeline; choose another folder"
            )

    def read(self) -> None:
        """Take the records from the file, if there is one.

        Raises:
            ConfigurationError: it is damaged.
        """
        if not self.path.is_file():
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.records = {name: StepRecord(**record) for name, record in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigurationError(
                f"{self.path} is damaged; remove {self.path.parent} or choose another output"
            ) from None

    def refuse_running(self) -> None:
        """Nothing is run beside a step that has outlived the call which started it.

        Raises:
            ConfigurationError: naming the process.
        """
        for name, record in self.records.items():
            if record.process is not None and record.process.is_running_here():
                pid = record.process.pid
                raise ConfigurationError(
                    f"the step {name} still runs as process {pid}, though the call that started it was "
                    f"killed; wait for its end, or end it with kill {pid}"
                )

    def is_done(self, step: Step) -> bool:
        """Whether the step is finished, as it is now."""
        record = self.records.get(step.name)
        return record is not None and record.key == step.key and step.is_complete()

    def goes_on(self, step: Step) -> bool:
        """Whether the step was begun as it is now."""
        record = self.records.get(step.name)
        return record is not None and record.key == step.key

    def jobs(self, steps: Sequence[Step]) -> dict[str, str]:
        """Job -> step, of all that were submitted and are not done."""
        done = {step.name for step in steps if self.is_done(step)}
        return {record.job: name for name, record in self.records.items() if record.job and name not in done}

    def describe(self, step: Step, jobs: Jobs | None = None) -> str:
        """How far the step is, in a few words, and why it is done again.

        Args:
            step: of the pipeline.
            jobs: what Slurm says of the jobs, if it was asked.
        """
        record = self.records.get(step.name)
        if record is None:
            return "to do"
        if record.key != step.key:
            return f"to do again: {self._change(step, record)}"
        if step.is_complete():
            return "done"
        iteration = step.iteration()
        at = "" if iteration is None else f"iteration {iteration} of {step.train_iters}"
        if record.job and jobs is not None and (record.exit_code is None or record.job in jobs.queued()):
            end = jobs.end(record.job)
            if end and at:
                return f"interrupted after {at}: {end}"
            return f"at {at}, {jobs.describe(record.job)}" if at else jobs.describe(record.job)
        if at:
            return f"interrupted after {at}"
        if record.job and record.exit_code is None:
            return f"submitted as job {record.job}"
        if record.exit_code:
            return f"failed with exit code {record.exit_code}"
        return "interrupted" if record.exit_code is None else "its result is gone"

    def save(self, steps: Sequence[Step]) -> None:
        """Write the records of ``steps``, in their order."""
        stored = {step.name: asdict(self.records[step.name]) for step in steps if step.name in self.records}
        write_text_durably(self.path, json.dumps(stored, indent=2) + "\n")

    @staticmethod
    def _change(step: Step, record: StepRecord) -> str:
        if portable(record.command) != portable(step.command):
            return "its command has changed"
        if record.fingerprint != step.fingerprint:
            return "what it reads has changed"
        others = [name for name, key in step.needs.items() if record.needs.get(name) != key]
        return f"it builds on {' and '.join(others) or 'other steps than before'}"
