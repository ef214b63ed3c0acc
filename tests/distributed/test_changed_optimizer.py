"""Optimizer settings that a resumed run changes take effect from its first step, in every form of optimizer.

The oracle is one uninterrupted run whose parameter groups are rewritten by hand at the same step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, Remember, run_config, train

CHANGED_AFTER, STEPS = 2, 4

BEFORE = OptimizerConfig(
    lr=1e-2, min_lr=1e-3, lr_decay_style=LRDecayStyle.constant, clip_grad=0.0, adam_eps=1e-6
)
AFTER = OptimizerConfig(
    lr=1e-4,
    min_lr=1e-5,
    lr_decay_style=LRDecayStyle.constant,
    clip_grad=0.3,
    weight_decay=0.5,
    adam_beta1=0.5,
    adam_beta2=0.7,
    adam_eps=1e-3,
)
# The first stage has all new parameters, so that the second one's group of them is empty.
NEW_PARAMETERS_IN_FRONT = replace(MODEL, mixers=["gla", "gla", "full", "swa"])
FORMS: dict[str, tuple[int, ParallelConfig, Precision, ModelConfig]] = {
    "fp32": (1, ParallelConfig(), Precision.fp32, MODEL),
    "bf16": (1, ParallelConfig(), Precision.bf16, MODEL),
    "bf16, PP 2, new parameters on one stage": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2),
        Precision.bf16,
        NEW_PARAMETERS_IN_FRONT,
    ),
    "bf16, DP 2, distributed optimizer": (
        2,
        ParallelConfig(use_distributed_optimizer=True),
        Precision.bf16,
        MODEL,
    ),
    "fp32, EP 2, experts": (2, ParallelConfig(expert_model_parallel_size=2), Precision.fp32, MODEL_76B),
    "fp32, EP 2, experts, distributed optimizer": (
        2,
        ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True),
        Precision.fp32,
        MODEL_76B,
    ),
}
MULTIPLIERS = {"3 -> 3": (3.0, 3.0), "3 -> 30": (3.0, 30.0), "1 -> 10": (1.0, 10.0), "10 -> 1": (10.0, 1.0)}


def _rewrite(trainer: Any, settings: OptimizerConfig) -> None:
    """Give every group the rates, betas, eps and decay of ``settings``."""
    optimizer = trainer.state.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.config.clip_grad = settings.clip_grad
        for group in part.param_groups:
            multiplier = settings.new_parameter_lr_mult if group["lr_mult"] != 1.0 else 1.0
            group["max_lr"], group["min_lr"] = settings.lr * multiplier, settings.min_lr * multiplier
            group["betas"], group["eps"] = (settings.adam_beta1, settings.adam_beta2), settings.adam_eps
    optimizer.config.clip_grad = settings.clip_grad
    scheduler = trainer.state.scheduler
    scheduler.start_wd = scheduler.end_wd = settings.weight_decay
    scheduler.step(increment=0)


def _train_and_change_by_hand(
    groups: ProcessGroups, config: RunConfig, first: OptimizerConfig, then: OptimizerConfig
) -> list[float]:
    """Losses of all steps of ``config``, with the settings ``first`` for the steps until the change."""
    from spikingbrain_train.training.trainer import Trainer

    class Change(Remember):
        def step_begin(self) -> None:
            if len(self.steps) == CHANGED_AFTER:
                _rewrite(trainer, then)

    change = Change()
    trainer = Trainer(config, groups, [change])
    _rewrite(trainer, first)
    trainer.train()
    return [loss for loss, _ in change.steps]


def _rates_by_name(groups: ProcessGroups, config: RunConfig) -> tuple[dict[str, float], list[float]]:
    """The rate of each parameter of this rank behind the last step, and the losses of a run."""
    from spikingbrain_train.training.trainer import Trainer

    remember = Remember()
    trainer = Trainer(config, groups, [remember])
    trainer.train()
    model = trainer.model.module
    offset = model.decoder.layers[0].layer_number - 1
    names = {}
    for name, parameter in model.named_parameters():
        kind, _, rest = name.partition("layers.")
        number, _, rest = rest.partition(".")
        names[id(parameter)] = f"{kind}layers.{int(number) + offset}.{rest}" if rest else name
    rates = {
        names[id(parameter)]: group["lr"]
        for group in trainer.state.optimizer.param_groups
        for parameter in group["params"]
    }
    return rates, [loss for loss, _ in remember.steps]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(tensor_model_parallel_size=2)),
        (2, ParallelConfig(pipeline_model_parallel_size=2)),
    ],
    ids=["one rank", "TP 2", "PP 2"],
)
def test_weights_of_swapped_mixers_have_their_rate_on_top_of_that_of_new_ones(
    world_size: int, parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    def config(optimizer: OptimizerConfig, steps: int) -> RunConfig:
        stage = StageConfig(train_iters=steps, seq_length=32, global_batch_size=4, micro_batch_size=2)
        return run_config(tmp_path, text, parallel=parallel, optimizer=optimizer, stage=stage)

    first = replace(BEFORE, new_parameter_lr_mult=3.0, mixer_lr_mult=2.0)
    for optimizer, steps in ((first, 1), (replace(first, mixer_lr_mult=0.5), 2)):  # started, then changed
        found = ranks.run(_rates_by_name, config(optimizer, steps), world_size=world_size, parallel=parallel)
        rates = {name: rate for own, _ in found for name, rate in own.items()}
        assert len(rates) > 30
        for name, rate in rates.items():
            swapped = ".self_attention." in name and ".layers.3." not in name  # MODEL's last one is full
            is_new = "gate_" in name and ".self_attention." in name or ".out_norm." in name
            expected = optimizer.lr * (optimizer.mixer_lr_mult if swapped else 1) * (3 if is_new else 1)
            assert rate == pytest.approx(expected, rel=1e-12), name


def _rates_and_losses(groups: ProcessGroups, config: RunConfig) -> tuple[list[float], list[float]]:
    """Rates of the groups that hold parameters, after a resumed run; and its losses."""
    from spikingbrain_train.training.trainer import Trainer

    remember = Remember()
    trainer = Trainer(config, groups, [remember])
    trainer.train()
    rates = [group["lr"] for group in trainer.state.optimizer.param_groups if group["params"]]
    return rates, [loss for loss, _ in remember.steps]


@pytest.mark.parametrize(
    ("form", "multipliers"),
    [
        *(("fp32", change) for change in MULTIPLIERS),
        ("bf16", "1 -> 10"),
        ("bf16, PP 2, new parameters on one stage", "3 -> 30"),
        ("bf16, DP 2, distributed optimizer", "1 -> 10"),
        ("fp32, EP 2, experts", "10 -> 1"),
        ("fp32, EP 2, experts, distributed optimizer", "1 -> 10"),
    ],
)
def test_changed_settings_take_effect_from_the_first_resumed_step(
    form: str, multipliers: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    world_size, parallel, precision, model = FORMS[form]
    mult_before, mult_after = MULTIPLIERS[multipliers]
    before = replace(BEFORE, new_parameter_lr_mult=mult_before)
    after = replace(AFTER, new_parameter_lr_mult=mult_after)
    if mult_after == 1.0:
        # The oracle keeps two groups where the resumed run has one. A gradient norm sums them in that order,
        # which torch 2.6 rounds differently; without clipping nothing depends on it.
        after = replace(after, clip_grad=0.0)

    def config(name: str, optimizer: OptimizerConfig, steps: int) -> RunConfig:
        stage = StageConfig(train_iters=steps, seq_length=32, global_batch_size=4, micro_batch_size=2)
        return run_config(
            tmp_path / name,
            text,
            model=model,
            parallel=parallel,
            precision=precision,
            optimizer=optimizer,
            stage=stage,
        )

    # Built with the settings that tell new parameters apart, so that both have a group to rewrite.
    oracle = config("oracle", after if mult_after != 1.0 else before, STEPS)
    expected = ranks.run(
        _train_and_change_by_hand, oracle, before, after, world_size=world_size, parallel=parallel
    )
    ranks.run(train, config("resumed", before, CHANGED_AFTER), world_size=world_size, parallel=parallel)
    resumed = ranks.run(
        _rates_and_losses, config("resumed", after, STEPS), world_size=world_size, parallel=parallel
    )

    assert {rate for own, _ in resumed for rate in own} == {after.lr, after.lr * mult_after}
    assert [losses for _, losses in resumed] == [losses[CHANGED_AFTER:] for losses in expected]
