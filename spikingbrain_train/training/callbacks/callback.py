"""What hangs on a run: hooks that the trainer calls, on every rank and in the order of the callbacks.

A callback of your own is a subclass of :class:`Callback` that overrides the hooks it needs, named in the
config as ``callbacks=[my_package.my_module.MyCallback]`` (docs/callbacks.md). This file needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.reporting.activity import Activity

if TYPE_CHECKING:
    import signal

    from torch import Tensor

    from spikingbrain_train.checkpoint.run_checkpoints import RunCheckpoints
    from spikingbrain_train.config.run_record import RunRecord
    from spikingbrain_train.data.loader import MicroBatch
    from spikingbrain_train.parallel.process_groups import ProcessGroups
    from spikingbrain_train.training.alert import Alert
    from spikingbrain_train.training.beginning import Beginning
    from spikingbrain_train.training.console import Console
    from spikingbrain_train.training.data_waits import DataWaits
    from spikingbrain_train.training.report import Report
    from spikingbrain_train.training.stages.data import StageData
    from spikingbrain_train.training.stages.losses import StepLosses
    from spikingbrain_train.training.training_state import TrainingState


class SkipUpdate(Exception):
    """The update of this step is left out, and the run goes on with the next batch.

    Raised by :meth:`Callback.agreed` or :meth:`Callback.before_update`, on all ranks together; its text is
    the reason in words: ``the loss became nan``.
    """


class Run(Protocol):
    """A run as callbacks see it."""

    config: RunConfig
    """Its precision is settled."""
    groups: ProcessGroups
    state: TrainingState
    """Model, optimizer, schedule; optimizer steps done."""
    data: StageData
    data_waits: DataWaits
    """How long this rank's steps have waited for batches."""
    checkpoints: RunCheckpoints
    record: RunRecord
    beginning: Beginning
    """What it started from, or went on from, and what has changed since."""
    console: Console
    stop_reason: str | None
    """Why the run ends after this step, None where it does not."""

    @property
    def callbacks(self) -> Callback:
        """All of them as one: who saves or evaluates tells the others."""
        ...

    @property
    def next_batch_size(self) -> int:
        """Sequences that the next step reads, over all ranks."""
        ...

    @property
    def is_last_step(self) -> bool:
        """Whether the stage's last step is done."""
        ...

    def stop(self, reason: str) -> None:
        """End after this step: save, and be started again later. Called on all ranks together."""
        ...

    def compute_gradients(self, batches: Iterator[MicroBatch]) -> StepLosses:
        """Forward and backward pass over the micro-batches of one step; the gradients begin at zero."""
        ...

    def report(self, report: Report) -> None:
        """Let every callback :meth:`Callback.log` a point."""
        ...

    def say(self, text: str) -> None:
        """Write a line for the user, on the main process."""
        ...

    def activity(
        self, what: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Activity]:
        """Let the log say that ``what`` still runs while the body does, and how much of ``total`` is done."""
        ...


class Callback:
    """Hooks of a run; here they do nothing.

    All ranks call them together unless a hook says otherwise: they may talk to each other in them, and must
    raise together.

    Its public methods are these hooks and no others: the name of a helper begins with an underscore, so that
    a misspelt hook is found.

    Attributes:
        run: what the callback hangs on; set before :meth:`start`.
    """

    run: Run

    def start(self) -> None:
        """The state is loaded, and no step of this process is done."""

    def step_begin(self) -> None:
        """The next step begins; ``run.state.iteration`` does not count it yet."""

    def vote(self, losses: StepLosses) -> int | Tensor:
        """A whole number on which all ranks agree before the weights change: :meth:`agreed` gets the largest.

        All votes take one reduction a step, in which the host waits for the device once. So a tensor (of one
        element, on the device of ``losses``) costs nothing more; reading one here would.

        Args:
            losses: of this step, whose gradients are there, reduced and not yet clipped.
        """
        return 0

    def agreed(self, number: int) -> None:
        """The largest vote of all ranks, the same everywhere.

        What is raised here keeps the weights as they are; a :class:`SkipUpdate` lets the run go on.
        """

    def before_update(self, grad_norm: float) -> None:
        """All ranks have agreed to update the weights. What is raised here keeps them as they are.

        A :class:`SkipUpdate` lets the run go on.

        Args:
            grad_norm: over all ranks.
        """

    def update_skipped(self, skipped: SkipUpdate) -> None:
        """The weights are not updated in this step; ``run.state`` does not count it yet.

        Nothing is reported of it, but ``step_end`` comes as ever.

        Args:
            skipped: why.
        """

    def report_due(self, report: Report) -> None:
        """A point of the step that is just done will be logged: add to it what you know of this step."""

    def step_end(self) -> None:
        """The step is done and reported; ``run.state.iteration`` counts it."""

    def before_evaluation(self) -> None:
        """An evaluation begins."""

    def after_evaluation(self, report: Report) -> None:
        """An evaluation is done, and its point will be logged: add to it what you know."""

    def log(self, report: Report) -> None:
        """Write a point down. Called on the main process only: talk to no other rank here."""

    def before_save(self) -> None:
        """A checkpoint of the current step will be written, with what :meth:`state_dict` says after this.

        First the one before may have to be waited for.
        """

    def after_snapshot(self) -> None:
        """The run may change again: the checkpoint is written or, with ``checkpoint.async_save``, copied."""

    def after_save(self, folder: Path) -> None:
        """A checkpoint is written, and it is the newest; with ``checkpoint.async_save`` some steps later.

        Args:
            folder: its iteration's.
        """

    def signal(self, number: signal.Signals) -> None:
        """Some rank was asked to stop: the run saves after this step, and ends."""

    def alert(self, alert: Alert) -> None:
        """Tell somebody who does not watch. Called on the main process only: talk to no other rank here."""

    def end(self, error: BaseException | None) -> None:
        """The run ends; called once, in the reverse order, where :meth:`start` has come to its end.

        Args:
            error: what ends it too early; ranks may then be on their own, so do not talk to others.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: numbers, texts, tensors on the CPU, lists and dicts of them.

        Stored is what the main process says, and every rank gets it back: let it be the same on all.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` said in the run that goes on.

        Called before :meth:`start`, and not where a checkpoint holds nothing of this callback.
        """
