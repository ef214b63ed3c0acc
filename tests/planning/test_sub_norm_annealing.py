"""Fading sub-norms in: how far they have come at each step, and what is refused."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.stage import SubNormAnnealingConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config

NORMS = (
    "model=tiny_hybrid model.attn_sub_norm=true stage.train_iters=8 stage.sub_norm_annealing.anneal_iters="
)


def check(words: str) -> None:
    check_run_config(to_run_config(compose_run([*words.split(), "dry_run=true"])), 1)


def test_they_come_in_on_a_straight_line() -> None:
    assert [SubNormAnnealingConfig(4).share(step) for step in (0, 1, 3, 4, 9)] == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert SubNormAnnealingConfig().share(0) == 1.0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"{NORMS}9", "stage.sub_norm_annealing.anneal_iters=9 must be at most stage.train_iters=8"),
        (f"{NORMS}4 model.attn_sub_norm=false", "anneal_iters=4 fades sub-norms in, but model.attn_sub_norm"),
        (f"{NORMS}-1", "stage.sub_norm_annealing.anneal_iters=-1 must be at least 0"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(words: str, sentence: str) -> None:
    check(f"{NORMS}8")
    with pytest.raises(ConfigurationError, match=sentence):
        check(words)
