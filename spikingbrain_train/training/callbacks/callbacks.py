"""The callbacks of a run as one."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.config.import_path import import_path_of
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.training.alert import Alert
from spikingbrain_train.training.callbacks.callback import Callback, Run, SkipUpdate
from spikingbrain_train.training.report import Report
from spikingbrain_train.training.stages.losses import StepLosses


class Callbacks(Callback):
    """Calls every hook of several callbacks in order, and :meth:`end` in the reverse order.

    Only those end that have started: where a start fails, the ones behind it know nothing of the run.

    Args:
        callbacks: of different classes.
        run: what they hang on.
    """

    def __init__(self, callbacks: Sequence[Callback], run: Run) -> None:
        self.run = run
        self._all = list(callbacks)
        self._started: list[Callback] = []
        for callback in self._all:
            callback.run = run
        self._voters = [each for each in self._all if type(each).vote is not Callback.vote]

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._all)

    def start(self) -> None:
        self.state_dict()  # what no checkpoint can hold is said now, not when the first one is due
        for callback in self._all:
            callback.start()
            self._started.append(callback)

    def step_begin(self) -> None:
        for callback in self._all:
            callback.step_begin()

    def agree(self, losses: StepLosses, grad_norm: float) -> None:
        """Take the votes of all ranks and tell the result: one reduction, for which the host waits.

        Then comes :meth:`before_update`.

        Args:
            losses: of the step.
            grad_norm: as this rank knows it.

        Raises:
            SkipUpdate: the first that one of them raised; all have been told the result.
        """
        losses.grad_norm = grad_norm
        groups = self.run.groups
        votes = torch.stack([_as_vote(voter.vote(losses), groups.device) for voter in self._voters])
        if groups.world_size > 1:
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        skips = []
        for voter, number in zip(self._voters, votes.tolist(), strict=True):
            try:
                voter.agreed(number)
            except SkipUpdate as skip:  # the others may have to end the run, or to finish a checkpoint
                skips.append(skip)
        if skips:
            raise skips[0]
        self.before_update(grad_norm)

    def before_update(self, grad_norm: float) -> None:
        for callback in self._all:
            callback.before_update(grad_norm)

    def update_skipped(self, skipped: SkipUpdate) -> None:
        for callback in self._all:
            callback.update_skipped(skipped)

    def report_due(self, report: Report) -> None:
        for callback in self._all:
            callback.report_due(report)

    def step_end(self) -> None:
        for callback in self._all:
            callback.step_end()

    def before_evaluation(self) -> None:
        for callback in self._all:
            callback.before_evaluation()

    def after_evaluation(self, report: Report) -> None:
        for callback in self._all:
            callback.after_evaluation(report)

    def log(self, report: Report) -> None:
        for callback in self._all:
            callback.log(report)

    def before_save(self) -> None:
        for callback in self._all:
            callback.before_save()

    def after_snapshot(self) -> None:
        for callback in self._all:
            callback.after_snapshot()

    def after_save(self, folder: Path) -> None:
        for callback in self._all:
            callback.after_save(folder)

    def signal(self, number: signal.Signals) -> None:
        for callback in self._all:
            callback.signal(number)

    def alert(self, alert: Alert) -> None:
        if self.run.groups.is_main_process:
            for callback in self._all:
                callback.alert(alert)

    def end(self, error: BaseException | None) -> None:
        with ExitStack() as stack:  # every one of them ends, whatever the others raise
            for callback in self._started:
                stack.callback(callback.end, error)
            self._started = []

    def state_dict(self) -> dict[str, Any]:
        """By import path; callbacks that have nothing to keep are left out.

        Raises:
            ConfigurationError: a checkpoint cannot hold it.
        """
        states = {import_path_of(type(callback)): callback.state_dict() for callback in self._all}
        for path, state in states.items():
            if (foreign := _first_foreign(state)) is not None:
                held = type(foreign).__name__
                raise ConfigurationError(
                    f"callbacks names {path}, whose state_dict holds a {held}; a checkpoint keeps numbers, "
                    "texts, tensors, and lists and dicts of them"
                )
        return {path: state for path, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand every callback its part, and say whose part nobody takes."""
        unclaimed = dict(state)
        for callback in self._all:
            if (own := unclaimed.pop(import_path_of(type(callback)), None)) is not None:
                callback.load_state_dict(own)
        for path in unclaimed:
            self.run.say(f"the checkpoint's state of {path} is left out: callbacks does not name it any more")


def _as_vote(vote: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(vote, Tensor):
        return vote.to(device, torch.int).reshape(())
    return torch.full((), vote, dtype=torch.int, device=device)  # a copy from the host would be waited for


def _first_foreign(value: Any) -> Any:
    """Something in ``value`` that a checkpoint cannot hold, None where all of it can be held."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return None
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        return value
    return next((found for part in parts if (found := _first_foreign(part)) is not None), None)
