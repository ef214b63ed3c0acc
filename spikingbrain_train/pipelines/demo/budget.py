"""How much of the recipe a machine can take in the time that the demo is given.

Where everything fits, the stages are those of ``conf/experiment/smollm2_*.yaml``. A slower machine gets
another recipe, which makes more of few tokens: shorter sequences (as many more steps), a lower rate, no
logits of the dense source (its forward pass is a fourth of a step), and fewer held-out windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.demo.named_settings import (
    BATCH,
    EVAL_INTERVAL,
    EVAL_ITERS,
    LOGITS,
    NOTHING_NAMED,
    RATES,
    TRAIN_ITERS,
    WARM_UP,
    NamedSettings,
)
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.reporting.activity import format_duration

DEFAULT_MINUTES = 12.0
SPEED_FILE, CHOICE_FILE = "demo_speed.json", "demo_lengths.json"

_SHORT_SEQUENCE = 512
_ALIGN_SHARE = 0.15
"""Of the time that is left for training; the rest goes to next-token loss."""
_EVALUATION_SHARE = 0.15
"""Of the time that training and evaluation have."""
_FEWEST_STEPS, _FEWEST_WINDOWS = 8, 4
_LATER_STARTS = 6.0
"""Processes after the measurement that import, load and write: two stages, two evaluations, export, text."""
_GENERATED_TOKENS = 64
_TRAINING_EVALUATIONS, _OTHER_EVALUATIONS = 4, 2
"""Of a shortened run: before and after each stage; the dense source and the export, by transformers."""
_RESERVE = 0.06
"""Of the budget: a machine is not as fast all the time."""


@dataclass(frozen=True)
class Speed:
    """What spikingbrain-measure-speed measured, all in seconds of wall time."""

    precision: str
    """The precision that runs get here."""
    reason: str
    """Why they do."""
    align: float
    """One token in the align stage."""
    cpt: float
    """One token of next-token loss."""
    evaluation: float
    """One token of a forward pass with its loss."""
    start: float
    """From the start of a process to its first step: imports, model, weights."""

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"align {1 / self.align:,.0f} tokens/s, pretraining {1 / self.cpt:,.0f} tokens/s, evaluation "
            f"{1 / self.evaluation:,.0f} tokens/s in {self.precision}, {self.reason}"
        )


@dataclass(frozen=True)
class Lengths:
    """What the stages are told, and why."""

    align_args: list[str] = field(default_factory=list)
    """Settings of spikingbrain-train for the align stage; empty is the whole recipe."""
    cpt_args: list[str] = field(default_factory=list)
    """The same for the pretraining stage."""
    sentence: str = ""
    """What was chosen, and why."""


def fit(
    speed: Speed,
    align: DictConfig,
    cpt: DictConfig,
    minutes: float,
    spent: float,
    held_out_tokens: int,
    named: NamedSettings = NOTHING_NAMED,
) -> Lengths:
    """Choose how long the stages are.

    Args:
        speed: of this machine.
        align: the align stage of the whole recipe with the user's own settings, a RunConfig.
        cpt: its pretraining stage.
        minutes: what the demo may take.
        spent: seconds that it has taken so far.
        held_out_tokens: tokens of held-out text that there are.
        named: what the user names himself; it is kept and takes what it takes, the rest is fitted around it.
    """
    whole_seconds = minutes * 60
    left = minutes * 60 * (1 - _RESERVE) - spent - _LATER_STARTS * speed.start
    left -= _GENERATED_TOKENS * 25 * speed.evaluation  # one token at a time makes poor use of the processor
    whole_align, whole_cpt = _tokens(align), _tokens(cpt)
    held_out = min(held_out_tokens, _windows(align) * align.stage.seq_length)
    # The dense source and the export are evaluated in float32 by transformers, whatever training does.
    other = _OTHER_EVALUATIONS * (3.0 if speed.precision == "bf16" else 1.2)
    logits = kind_of(cpt.stage).needs_teacher(cpt.stage)
    recipe = whole_align * speed.align + whole_cpt * (speed.cpt + (speed.evaluation if logits else 0))
    recipe += _calibration(align, speed)
    recipe += held_out * speed.evaluation * (_evaluations(align) + _evaluations(cpt) + other)
    measured = (
        f"this machine aligns {1 / speed.align:,.0f} and pretrains {1 / speed.cpt:,.0f} tokens a second"
    )
    measured += f" in {speed.precision} ({speed.reason.removeprefix('because ')})"
    whole = f"{whole_align:,} tokens of alignment and {whole_cpt:,} of pretraining"
    if recipe <= left:
        return Lengths(sentence=f"{measured}: the whole recipe, {whole}, fits into {minutes:g} minutes")
    whole_seconds += recipe - left
    length, batch = align.stage.seq_length, align.stage.global_batch_size
    if not named.anywhere(*BATCH):
        length, batch = min(_SHORT_SEQUENCE, length), 1
    logits = logits and named.in_stage("cpt", *LOGITS)
    a_window = length * speed.evaluation
    if named.anywhere(EVAL_ITERS):
        windows = min(_windows(align), -(-held_out_tokens // length))
    else:
        share = int(left * _EVALUATION_SHARE / (a_window * (_TRAINING_EVALUATIONS + other)))
        windows = min(-(-held_out // length), max(_FEWEST_WINDOWS, share))
        windows = -(-windows // batch) * batch
    left -= windows * a_window * (_TRAINING_EVALUATIONS + other) + _calibration(align, speed)
    fitted_align = _FittedStage("align", align, named, length, speed.align, windows * a_window)
    a_token = speed.cpt + (speed.evaluation if logits else 0)
    fitted_cpt = _FittedStage("cpt", cpt, named, length, a_token, windows * a_window)
    # What one stage cannot use, because its recipe is no longer or its length is named, the other gets.
    for_align = fitted_align.seconds(fitted_align.steps(0)) if fitted_align.is_named else left * _ALIGN_SHARE
    cpt_steps = fitted_cpt.steps(left - for_align)
    align_steps = fitted_align.steps(left - fitted_cpt.seconds(cpt_steps))
    cpt_steps = fitted_cpt.steps(left - fitted_align.seconds(align_steps))
    left -= fitted_align.seconds(align_steps) + fitted_cpt.seconds(cpt_steps)
    seconds = minutes * 60 * (1 - _RESERVE) - left
    if seconds <= minutes * 60:
        takes = f"to end within {minutes:g} minutes the stages take"
    else:
        takes = f"about {format_duration(seconds)} are needed, not {minutes:g} minutes, as the stages take"
    shared = {
        **({} if named.anywhere(*BATCH) else {"stage.seq_length": length, "stage.global_batch_size": batch}),
        **({} if named.anywhere(EVAL_ITERS) else {EVAL_ITERS: windows // batch}),
        EVAL_INTERVAL: 0,
    }
    alone = {"stage.kind": "cpt", "stage.distillation.weight": "null"}
    kind = {} if named.in_stage("cpt", *LOGITS) else alone
    rates = {} if named.in_stage("cpt", *RATES) else {"optimizer.lr": "2e-4", "optimizer.min_lr": "2e-5"}
    return Lengths(
        align_args=fitted_align.arguments({TRAIN_ITERS: align_steps, **shared, WARM_UP: align_steps // 8}),
        cpt_args=fitted_cpt.arguments(
            {TRAIN_ITERS: cpt_steps, **shared, **kind, **rates, WARM_UP: cpt_steps // 12}
        ),
        sentence=f"{measured}: {takes} {fitted_align.tokens(align_steps):,} and "
        f"{fitted_cpt.tokens(cpt_steps):,} tokens (the whole recipe takes {whole}, about "
        f"{format_duration(whole_seconds)}), in sequences of {length}, {'with' if logits else 'without'} the "
        f"dense source's logits, and are evaluated on {windows} windows; more time gives a better model",
    )


@dataclass(frozen=True)
class _FittedStage:
    """A stage whose steps are counted, unless the user names how many there are."""

    name: str
    run: DictConfig
    named: NamedSettings
    length: int
    """Tokens of a sequence."""
    token_seconds: float
    evaluation_seconds: float
    """One evaluation of the held-out windows."""

    @property
    def is_named(self) -> bool:
        """Whether the user names the number of steps."""
        return self.named.in_stage(self.name, TRAIN_ITERS)

    @property
    def step_tokens(self) -> int:
        batch = self.run.stage.global_batch_size if self.named.anywhere(*BATCH) else 1
        return self.length * batch

    @property
    def step_seconds(self) -> float:
        """One step, with its share of the evaluations in between that the user names."""
        interval = self.run.logging.eval_interval if self.named.in_stage(self.name, EVAL_INTERVAL) else 0
        between = self.evaluation_seconds / interval if interval > 0 else 0.0
        return self.token_seconds * self.step_tokens + between

    def steps(self, seconds: float) -> int:
        """How many fit into ``seconds``, no more than the recipe has."""
        if self.is_named:
            return self.run.stage.train_iters
        most = _tokens(self.run) // self.step_tokens
        return max(self._fewest(), min(int(seconds / self.step_seconds), most))

    def seconds(self, steps: int) -> float:
        return steps * self.step_seconds

    def tokens(self, steps: int) -> int:
        return steps * self.step_tokens

    def arguments(self, chosen: Mapping[str, object]) -> list[str]:
        """The settings of ``chosen`` that the user leaves to the demo."""
        return [
            f"{name}={value}" for name, value in chosen.items() if not self.named.in_stage(self.name, name)
        ]

    def _fewest(self) -> int:
        """Steps that the schedules which the user names need, or few."""
        optimizer = self.run.optimizer
        scheduled = optimizer.lr_warmup_iters if self.named.in_stage(self.name, WARM_UP) else 0
        scheduled += optimizer.lr_wsd_decay_iters or 0
        scheduled = max(scheduled, self.run.stage.spike_annealing.anneal_iters)
        # A warm-up that is not named is an eighth of the steps and comes on top.
        return max(_FEWEST_STEPS, scheduled + scheduled // 4 + 1 if scheduled else 0)


def _tokens(run: DictConfig) -> int:
    return run.stage.train_iters * run.stage.global_batch_size * run.stage.seq_length


def _windows(run: DictConfig) -> int:
    """The most held-out windows that a stage is evaluated on."""
    return run.logging.eval_iters * run.stage.global_batch_size


def _evaluations(run: DictConfig) -> int:
    """Evaluations of a stage: one before it, one at its end, and those in between."""
    interval = run.logging.eval_interval
    return 2 + ((run.stage.train_iters - 1) // interval if interval > 0 else 0)


def _calibration(align: DictConfig, speed: Speed) -> float:
    """Seconds of fitting the output projections: about half a step's work a token."""
    return align.stage.alignment.calibration_tokens * speed.align / 2


def check_minutes(minutes: float) -> None:
    """Raise ConfigurationError if ``--budget`` is no time that a demo could be given."""
    if not 1 <= minutes <= 100_000:
        raise ConfigurationError(f"budget is {minutes:g} minutes; give at least 1, e.g. {DEFAULT_MINUTES:g}")


def read_speed(path: Path) -> Speed:
    """What spikingbrain-measure-speed wrote.

    Raises:
        ConfigurationError: the file is damaged.
    """
    try:
        return Speed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{path} cannot be read; remove it, and the demo measures again") from None
