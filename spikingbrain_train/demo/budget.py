"""How much of the recipe a machine can take in the time that the demo is given.

Where everything fits, the stages are those of ``conf/experiment/smollm2_*.yaml``. A slower machine gets
another recipe, which makes more of few tokens: shorter sequences (as many more steps), a lower rate, no
logits of the dense source (its forward pass is a fourth of a step), and fewer held-out windows.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from spikingbrain_train.config.errors import ConfigurationError
from spikingbrain_train.reporting.activity import format_duration

DEFAULT_MINUTES = 12.0
CHOICE_FILE = "demo_lengths.json"

_SHORT_SEQUENCE = 512
_ALIGN_SHARE = 0.4
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
    """What tools/measure_speed.py measured, all in seconds of wall time."""

    precision: str
    """The precision that runs get here."""
    reason: str
    """Why they do."""
    align: float
    """One token in the align stage."""
    cpt: float
    """One token in the pretraining stage without distillation."""
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
    """Settings of train.py for the align stage; empty is the whole recipe."""
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
    *,
    may_shorten: bool = True,
) -> Lengths:
    """Choose how long the stages are.

    Args:
        speed: of this machine.
        align: the align stage of the whole recipe, a RunConfig.
        cpt: its pretraining stage.
        minutes: what the demo may take.
        spent: seconds that it has taken so far.
        held_out_tokens: tokens of held-out text that there are.
        may_shorten: sequences may become shorter, and a step may take a single one.
    """
    left = minutes * 60 * (1 - _RESERVE) - spent - _LATER_STARTS * speed.start
    left -= _GENERATED_TOKENS * 25 * speed.evaluation  # one token at a time makes poor use of the processor
    whole_align, whole_cpt = _tokens(align), _tokens(cpt)
    held_out = min(held_out_tokens, _windows(align) * align.stage.seq_length)
    # The dense source and the export are evaluated in float32 by transformers, whatever training does.
    other = _OTHER_EVALUATIONS * (3.0 if speed.precision == "bf16" else 1.2)
    recipe = (
        whole_align * speed.align + whole_cpt * (speed.cpt + speed.evaluation) + _calibration(align, speed)
    )
    recipe += held_out * speed.evaluation * (_evaluations(align) + _evaluations(cpt) + other)
    measured = (
        f"this machine aligns {1 / speed.align:,.0f} and pretrains {1 / speed.cpt:,.0f} tokens a second"
    )
    measured += f" in {speed.precision} ({speed.reason.removeprefix('because ')})"
    whole = f"{whole_align:,} tokens of alignment and {whole_cpt:,} of pretraining"
    if recipe <= left:
        return Lengths(sentence=f"{measured}: the whole recipe, {whole}, fits into {minutes:g} minutes")
    whole_seconds = minutes * 60 - left + recipe
    length = min(_SHORT_SEQUENCE, align.stage.seq_length) if may_shorten else align.stage.seq_length
    batches = [1, 1] if may_shorten else [run.stage.global_batch_size for run in (align, cpt)]
    align_step, cpt_step = (length * batch for batch in batches)
    evaluations = _TRAINING_EVALUATIONS + other
    a_window = length * speed.evaluation * evaluations
    most = -(-held_out // length)
    chosen_windows = min(most, max(_FEWEST_WINDOWS, int(left * _EVALUATION_SHARE / a_window)))
    left -= chosen_windows * a_window + _calibration(align, speed)
    # What one stage cannot use, because its recipe is no longer, the other gets.
    cpt_steps = _steps(left * (1 - _ALIGN_SHARE) / (speed.cpt * cpt_step), whole_cpt // cpt_step)
    rest = left - cpt_steps * cpt_step * speed.cpt
    align_steps = _steps(rest / (speed.align * align_step), whole_align // align_step)
    rest = left - align_steps * align_step * speed.align
    cpt_steps = _steps(rest / (speed.cpt * cpt_step), whole_cpt // cpt_step)
    shared = [
        f"stage.seq_length={length}",
        f"stage.global_batch_size={batches[0]}",
        f"logging.eval_iters={-(-chosen_windows // batches[0])}",
        "logging.eval_interval=0",
    ]
    return Lengths(
        align_args=[
            f"stage.train_iters={align_steps}",
            *shared,
            f"optimizer.lr_warmup_iters={align_steps // 8}",
        ],
        cpt_args=[
            f"stage.train_iters={cpt_steps}",
            *shared,
            "stage.distillation.weight=0",
            "optimizer.lr=2e-4",
            "optimizer.min_lr=2e-5",
            f"optimizer.lr_warmup_iters={cpt_steps // 12}",
        ],
        sentence=f"{measured}: to end within {minutes:g} minutes the stages take "
        f"{align_steps * align_step:,} and {cpt_steps * cpt_step:,} tokens (the whole recipe takes {whole}, "
        f"about {format_duration(whole_seconds)}), in sequences of {length}, without the dense source's "
        f"logits, and are evaluated on {chosen_windows} windows; more time gives a better model",
    )


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


def _steps(wanted: float, most: int) -> int:
    return max(_FEWEST_STEPS, min(int(wanted), most))


def check_minutes(minutes: float) -> None:
    """Raise ConfigurationError if ``--budget`` is no time that a demo could be given."""
    if not 1 <= minutes <= 100_000:
        raise ConfigurationError(
            f"--budget is {minutes:g} minutes; give at least 1, e.g. {DEFAULT_MINUTES:g}"
        )


def read_speed(path: Path) -> Speed:
    """What tools/measure_speed.py wrote.

    Raises:
        ConfigurationError: the file is damaged.
    """
    try:
        return Speed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{path} cannot be read; remove it, and the demo measures again") from None


def recall(output: Path, key: str) -> Lengths | None:
    """The choice of an earlier call, if it was made for the same ``key``."""
    try:
        stored = json.loads((output / CHOICE_FILE).read_text(encoding="utf-8"))
        return Lengths(**stored["lengths"]) if stored["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(output: Path, key: str, lengths: Lengths) -> None:
    """Keep a choice, so that the next call goes on instead of choosing anew."""
    path = output / CHOICE_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(
        json.dumps({"key": key, "lengths": asdict(lengths)}, indent=2) + "\n", encoding="utf-8"
    )
    os.replace(temporary, path)
