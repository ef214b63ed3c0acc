"""The settings that a user names for one stage or the other. The demo never sets them itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRAIN_ITERS = "stage.train_iters"
WARM_UP = "optimizer.lr_warmup_iters"
RATES = ("optimizer.lr", "optimizer.min_lr")
LOGITS = ("stage.kind", "stage.distillation.weight", "stage.distillation.temperature")
EVAL_ITERS, EVAL_INTERVAL = "logging.eval_iters", "logging.eval_interval"
BATCH = ("stage.seq_length", "stage.global_batch_size", "stage.micro_batch_size")


@dataclass(frozen=True)
class NamedSettings:
    """Further arguments of spikingbrain-train in the two stages."""

    align: Sequence[str] = ()
    cpt: Sequence[str] = ()

    def in_stage(self, stage: str, *settings: str) -> bool:
        """Whether the user names one of ``settings`` for a stage, ``align`` or ``cpt``."""
        given = [_name(argument) for argument in (self.align if stage == "align" else self.cpt)]
        return any(
            setting == name or setting.startswith(f"{name}.") for setting in settings for name in given
        )

    def anywhere(self, *settings: str) -> bool:
        """Whether the user names one of ``settings`` for either stage."""
        return self.in_stage("align", *settings) or self.in_stage("cpt", *settings)


NOTHING_NAMED = NamedSettings()


def _name(argument: str) -> str:
    """``stage.train_iters`` of ``+stage.train_iters=3``; nothing for the choice of a group, ``stage=cpt``."""
    name, _, value = argument.lstrip("+~").partition("=")
    return name if "." in name or value.startswith("{") else ""
