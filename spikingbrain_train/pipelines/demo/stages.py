"""The demo's two training stages: the recipe, what was fitted to the machine, and what the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.demo.budget import Lengths
from spikingbrain_train.pipelines.demo.named_settings import RATES, WARM_UP, NamedSettings
from spikingbrain_train.pipelines.kinds.train import hydra_value

STAGES = ("align", "cpt")


@dataclass(frozen=True)
class StagePaths:
    """What both stages read and write."""

    checkpoint: str
    """Where alignment starts; what the speed of either stage is measured with."""
    teacher: str
    train: str
    """Prefix of the training text."""
    valid: str
    """Prefix of the held-out text."""
    output: Path

    def arguments(self, stage: str) -> list[str]:
        """The recipe of a stage, with its paths."""
        return [
            f"experiment=smollm2_{stage}",
            f"checkpoint.load={hydra_value(self.checkpoint)}",
            f"stage.teacher={hydra_value(self.teacher)}",
            f"data.train=[{hydra_value(self.train)}]",
            f"data.valid=[{hydra_value(self.valid)}]",
            f"output_dir={hydra_value(str(self.output / stage))}",
        ]


@dataclass(frozen=True)
class FittedStages:
    """What the stages are told beside their recipe, and what that makes of them."""

    align: list[str]
    """Settings of spikingbrain-train for the align stage, those of the user left out."""
    cpt: list[str]
    seq_length: int
    """Tokens of a held-out window, the same for both stages."""
    max_windows: int
    """Held-out windows that are evaluated."""
    sentence: str = field(default="")
    """What was chosen, and why."""


def fitted_stages(lengths: Lengths, own: NamedSettings) -> FittedStages:
    """Settings of both stages that hold the chosen lengths and can stand beside the user's own.

    Raises:
        ConfigurationError: a setting that spikingbrain-train would refuse, or stages that cannot be compared.
    """
    fitted: Mapping[str, Sequence[str]] = {"align": lengths.align_args, "cpt": lengths.cpt_args}
    arguments, runs = {}, {}
    for stage in STAGES:
        recipe = [f"experiment=smollm2_{stage}", *fitted[stage]]
        beside = beside_own(stage, recipe, own)
        arguments[stage] = [*fitted[stage], *beside]
        runs[stage] = compose_run([*recipe, *beside, *getattr(own, stage)])
    evaluated = {stage: windows(run) for stage, run in runs.items()}
    if evaluated["align"] != evaluated["cpt"]:
        raise ConfigurationError(
            "the stages are evaluated on different text (align: {0[1]} windows of {0[0]} tokens, cpt: "
            "{1[1]} of {1[0]}); give both the same stage.seq_length and the same logging.eval_iters * "
            "stage.global_batch_size".format(evaluated["align"], evaluated["cpt"])
        )
    seq_length, max_windows = evaluated["align"]
    return FittedStages(arguments["align"], arguments["cpt"], seq_length, max_windows, lengths.sentence)


def beside_own(stage: str, arguments: Sequence[str], own: NamedSettings) -> list[str]:
    """What of ``arguments`` cannot stand beside the user's own settings, scaled to them.

    A warm-up longer than the stage becomes an eighth of it, a last rate above the first a tenth of that.
    """
    named = list(getattr(own, stage))
    if not named:
        return []
    run = compose_run([*arguments, *named])
    scaled = []
    if not own.in_stage(stage, WARM_UP) and run.optimizer.lr_warmup_iters >= run.stage.train_iters:
        scaled.append(f"{WARM_UP}={run.stage.train_iters // 8}")
    if not own.in_stage(stage, RATES[1]) and run.optimizer.min_lr > run.optimizer.lr:
        scaled.append(f"{RATES[1]}={run.optimizer.lr / 10:g}")
    return scaled


def windows(run: DictConfig) -> tuple[int, int]:
    """Tokens of a held-out window, and how many windows a stage evaluates on at most."""
    return run.stage.seq_length, run.logging.eval_iters * run.stage.global_batch_size
