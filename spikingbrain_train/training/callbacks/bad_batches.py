"""What a run does with a batch that is not to be learnt from, and when it gives up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from spikingbrain_train.config.numerics import OnBadBatch
from spikingbrain_train.errors import NumericalError
from spikingbrain_train.training.alert import Alert
from spikingbrain_train.training.bad_batch_file import Share, not_finite_on, shares_of, write_bad_batch
from spikingbrain_train.training.callbacks.callback import Callback, SkipUpdate
from spikingbrain_train.training.callbacks.finite_checks import advice
from spikingbrain_train.training.generators import Generators
from spikingbrain_train.training.replay import Computed, Verdict, compare, named
from spikingbrain_train.training.running_median import RunningMedian
from spikingbrain_train.training.stages.losses import FINE, NOT_FINITE

if TYPE_CHECKING:
    from torch import Tensor

    from spikingbrain_train.training.report import Report
    from spikingbrain_train.training.stages.losses import StepLosses

_BAD_NORM, _SPIKE, _BAD_LOSS = range(FINE + 1, FINE + 4)
"""Votes above :data:`FINE`: of several troubles the largest is said."""


@dataclass
class _Counts:
    """What checkpoints keep: all ranks have the same."""

    skipped: int = 0
    rollbacks: int = 0
    in_a_row: int = 0
    """Since the last good one, or since weights were last taken back."""
    last_good: int = 0
    """The newest iteration whose weights may be taken back."""
    updates: int = 0
    """Steps of this run that changed the weights."""
    bad: list[int] = field(default_factory=list)
    """Iterations of bad batches among the last numerics.stop_within."""


class BadBatches(Callback):
    """Leaves out the updates of bad batches: loss or gradient norm NaN or infinite, or the loss a spike.

    All ranks agree before the update, in the reduction that takes the other votes, too. ``numerics`` says
    what else happens: how often a run goes on, when it goes back to a checkpoint, when it ends. What another
    callback skips counts here as well.
    """

    def __init__(self) -> None:
        self._counts = _Counts()
        self._stored_losses: dict[str, Any] = {}
        self._median: RunningMedian | None = None
        self._generators: Generators | None = None
        self._losses: StepLosses | None = None
        self._is_ours = False
        """Whether it was here that the batch of this step was found bad."""
        self._is_skipped = False

    def start(self) -> None:
        self._settings = self.run.config.numerics
        if self._settings.looks_for_spikes:
            self._median = RunningMedian(self._settings.spike_window, self.run.groups.device)
            if self._stored_losses:
                self._median.load_state_dict(self._stored_losses)
        self._stored_losses = {}

    def step_begin(self) -> None:
        self._is_skipped = self._is_ours = False
        if self._settings.replay:
            self._generators = Generators.of(self.run.groups)

    def vote(self, losses: StepLosses) -> Tensor:
        self._losses = losses
        return self._standing(losses)

    def agreed(self, number: int) -> None:
        if number == FINE:
            return
        assert self._losses is not None
        if number == _BAD_NORM:
            # Of replicas, one may be alone with it.
            norm = torch.tensor(self._losses.grad_norm, dtype=torch.float64, device=self.run.groups.device)
            torch.distributed.all_reduce(norm)
            reason = f"the gradient norm became {float(norm)}"
        else:
            loss = self._losses.reduced()["train/loss"]
            reason = f"the loss became {loss}"
            if number == _SPIKE:
                assert self._median is not None
                usual = float(self._median.median())
                reason = f"the loss of {loss:.4g} is a spike above the median of {usual:.4g}"
        self._found_bad(reason)

    def update_skipped(self, skipped: SkipUpdate) -> None:
        run, counts, settings = self.run, self._counts, self._settings
        self._is_skipped = True
        counts.skipped += 1
        counts.in_a_row += 1
        counts.bad = [each for each in counts.bad if each > self._step - settings.stop_within] + [self._step]
        assert self._losses is not None
        losses, self._losses = self._losses, None
        shares = shares_of(run.config, run.groups, run.state.consumed_samples, losses)
        verdict = self._replay(losses) if settings.replay and self._is_ours else None
        self._write(str(skipped), shares, verdict)
        if len(counts.bad) >= settings.stop_after:
            raise NumericalError(
                f"{len(counts.bad)} of the last {settings.stop_within} batches were bad, which is what "
                f"numerics.stop_after={settings.stop_after} ends a run for; "
                f"{self._of_the_last(skipped, verdict)}"
            )
        if settings.roll_back_after is not None and counts.in_a_row >= settings.roll_back_after:
            if counts.updates == 0 and counts.last_good == 0:
                raise NumericalError(
                    f"the first {counts.in_a_row} batches were bad; {self._of_the_last(skipped, verdict)}"
                )
            self._roll_back(self._of_the_last(skipped, verdict))

    def step_end(self) -> None:
        losses, self._losses = self._losses, None
        if self._is_skipped:
            return
        self._counts.in_a_row = 0
        self._counts.last_good = self.run.state.iteration
        self._counts.updates += 1
        if self._median is not None:
            assert losses is not None
            self._median.add(losses.on_device["train/loss"])

    def report_due(self, report: Report) -> None:
        report.add("train/skipped_batches", self._counts.skipped)
        report.add("train/rollbacks", self._counts.rollbacks)

    def state_dict(self) -> dict[str, Any]:
        losses = self._stored_losses if self._median is None else self._median.state_dict()
        return {"counts": asdict(self._counts), "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = _Counts(**state["counts"])
        self._stored_losses = state["losses"]

    @property
    def _step(self) -> int:
        """The step that is under way, counted from 1."""
        return self.run.state.iteration + 1

    def _standing(self, losses: StepLosses) -> Tensor:
        """[] int: what is wrong with a batch, as far as this rank knows."""
        assert losses.grad_norm is not None
        standing = losses.standing
        if not math.isfinite(losses.grad_norm):
            standing = standing.clamp(min=_BAD_NORM)
        if self._median is not None:
            # Looked at on every step, because the median needs it.
            is_spike = self._is_spike(losses.on_device["train/loss"], self._median)
            standing = torch.where(is_spike, _SPIKE, standing)
        return torch.where(losses.standing == NOT_FINITE, _BAD_LOSS, standing)

    def _is_spike(self, loss: Tensor, median: RunningMedian) -> Tensor:
        """[] bool: of a finite loss, [], whether it is too far above the median."""
        settings = self._settings
        if median.count < settings.spike_warmup:
            return torch.zeros_like(loss, dtype=torch.bool)
        usual, is_spike = median.median(), loss.isfinite()
        if settings.spike_factor is not None:
            is_spike = is_spike & (loss > usual * settings.spike_factor)
        if settings.spike_margin is not None:
            is_spike = is_spike & (loss > usual + settings.spike_margin)
        return is_spike

    def _found_bad(self, reason: str) -> None:
        if self._settings.on_bad_batch is OnBadBatch.stop:
            raise NumericalError(
                f"{reason} at iteration {self._step}, so the run stops before it spoils anything"
                f"{self._advice()}"
            )
        self._is_ours = True
        raise SkipUpdate(reason)

    def _advice(self) -> str:
        return advice(self.run.config, steps_done=self._counts.updates)

    def _of_the_last(self, skipped: SkipUpdate, verdict: Verdict | None) -> str:
        """What the sentence that ends a run says of its last batch, and what to do."""
        again = "" if verdict is None else f" (computed again, {verdict.describe()})"
        return f"of the last, {skipped} at iteration {self._step}{again}{self._advice()}"

    def _replay(self, losses: StepLosses) -> Verdict:
        run = self.run
        first = Computed.of(losses, run.state.engine.gradients())
        assert self._generators is not None
        self._generators.restore(run.groups)
        with run.activity("computing a bad batch once more"):
            again = run.compute_gradients(run.data.train_batches(run.state.consumed_samples))
        second = Computed.of(again, run.state.engine.gradients())
        again.grad_norm = run.state.engine.gradient_norm()
        standing = self._standing(again)
        torch.distributed.all_reduce(standing, op=torch.distributed.ReduceOp.MAX)
        is_bad = int(standing) != FINE
        return compare(
            first,
            second,
            run.groups,
            is_bad_again=is_bad,
            is_exact=torch.are_deterministic_algorithms_enabled(),
        )

    def _write(self, reason: str, shares: list[Share], verdict: Verdict | None) -> None:
        run = self.run
        again = None if verdict is None else verdict.describe()
        what = {"iteration": self._step, "reason": reason, "computed_again": again}
        if verdict is not None:
            what["suspected_ranks"] = list(verdict.suspected)
        path = write_bad_batch(run.config, run.groups, run.data, shares, what)
        first, last = (
            run.state.consumed_samples,
            run.state.consumed_samples + run.next_batch_size,
        )
        where = named(not_finite_on(shares))
        text = (
            f"iteration {self._step} updates nothing, because {reason}{where}; its samples, {first} to "
            f"{last}, are in {path}" + ("" if again is None else f"; computed again, {again}")
        )
        self._warn("bad batch", text)

    def _warn(self, title: str, text: str) -> None:
        self.run.say(f"warning: {text}")
        self.run.callbacks.alert(Alert(title, text))

    def _roll_back(self, last: str) -> None:
        """Take weights back; ``last`` is what is to be said where there are none to take."""
        run, counts = self.run, self._counts
        if run.checkpoints.pending is not None:
            run.callbacks.after_save(run.checkpoints.wait())
        with run.activity("taking weights back"):
            iteration = run.checkpoints.roll_back(run.state, newest=counts.last_good)
        begun = f"{counts.in_a_row} bad batches in a row: "
        counts.in_a_row = 0
        if iteration is None:
            raise NumericalError(f"{begun}no older checkpoint is there to go back to; {last}")
        counts.last_good = iteration - 1  # where it is as bad from there, go back further
        counts.rollbacks += 1
        self._warn(
            "bad batches in a row",
            f"{begun}weights and optimizer state are again those of iteration {iteration}; the schedule and "
            "the position in the data stay",
        )
