"""Schedules of the L1 loss inside feed-forwards: the published ones, and those that do not fit."""

from __future__ import annotations

import math

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import SparsityConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config

RELU = "model=tiny_hybrid model.activation_func=relu model.max_position_embeddings=4096"
PRESETS = {
    "prosparse_7b": (16500, 34.6e9, {0: 0.0, 5000: 0.0, 6000: 5e-3, 10000: 5e-2, 12000: 5e-2, 16000: 0.2}),
    "prosparse_minicpm_1b": (
        *(35000, 172e9),
        {0: 0.0, 10000: 0.0, 15000: 1e-3, 20000: 5e-3, 22000: 5e-3, 25000: 5e-3, 35000: 5e-2},
    ),
    "prosparse_minicpm_1b_decay": (60000, None, {0: 5e-2, 30000: 5e-2, 60000: 5e-2}),
    "prosparse_minicpm_1b_sft": (6000, None, {0: 1e-2, 6000: 1e-2}),
}
"""Steps, tokens and factors as published."""


def dry_run(set_: str) -> RunConfig:
    """Compose and check."""
    config = to_run_config(compose_run([*set_.split(), "dry_run=true"]))
    check_run_config(config, 1)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_schedules(name: str) -> None:
    stage = dry_run(f"{RELU} stage={name}").stage
    steps, tokens, factors = PRESETS[name]
    assert stage.train_iters == steps
    assert tokens is None or stage.tokens == pytest.approx(tokens, rel=2e-3)
    found = {step: stage.sparsity.l1_factor(step) for step in factors}
    assert found == pytest.approx(factors, abs=1e-15)


def test_a_rise_is_half_a_sine() -> None:
    """ProSparse's ``l0 + (l1 - l0) / 2 * (sin(-pi / 2 + pi * share) + 1)``, here as its equal of a cosine."""
    schedule = SparsityConfig([0.01, 0.05, 0.03], [10, 30, 40])
    for step in range(60):
        expected = 0.01
        if 10 <= step < 30:
            expected += 0.04 * (1 - math.cos(math.pi * (step - 10) / 20)) / 2
        elif step >= 30:
            share = min(step - 30, 10) / 10
            expected = 0.05 - 0.02 * (1 - math.cos(math.pi * share)) / 2
        assert schedule.l1_factor(step) == pytest.approx(expected, rel=1e-12)
    assert SparsityConfig().l1_factor(7) == 0.0


@pytest.mark.parametrize(
    ("set_", "sentence"),
    [
        (
            f"{RELU} stage=prosparse_7b stage.train_iters=16000",
            r"l1_end_steps=\[5000,.*\] ends behind stage\.train_iters=16000; .*train for 16500 steps",
        ),
        (
            f"{RELU} stage.sparsity.l1_factors=[0,0.1] stage.sparsity.l1_end_steps=[5]",
            r"l1_factors names 2 stages and stage\.sparsity\.l1_end_steps 1",
        ),
        (
            f"{RELU} stage.sparsity.l1_factors=[0,0.1] stage.sparsity.l1_end_steps=[5,5]",
            r"l1_end_steps=\[5,5\] must rise",
        ),
        (
            f"{RELU} stage.sparsity.l1_factors=[-0.1] stage.sparsity.l1_end_steps=[5]",
            r"l1_factors=-0\.1 must be at least 0",
        ),
        (
            "model=tiny_hybrid stage.sparsity.l1_factors=[0.1] stage.sparsity.l1_end_steps=[5]",
            r"only relu, fatrelu and relu2 get, but model\.activation_func=silu",
        ),
        (
            f"{RELU} model.activation_func=fatrelu model.fatrelu_threshold=-1",
            "fatrelu_threshold=-1.* at least 0",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_in_a_sentence(set_: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as refusal:
        dry_run(set_)
    assert "\n" not in str(refusal.value)
