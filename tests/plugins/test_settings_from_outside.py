"""Settings of kinds from outside are explained, and noted where nothing reads them, like ours."""

from __future__ import annotations

import pytest

from spikingbrain_train.architecture.layer_letters import layer_letters
from spikingbrain_train.config.asked import manual_of_conversion, manual_of_run
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.planning.unread_settings import unread_settings

pytestmark = pytest.mark.usefixtures("plugins")


def test_help_tells_about_them() -> None:
    of_runs, of_recipes = (
        manual_of_run().about("fixed_decay"),
        manual_of_conversion().about("relu_squared.scale"),
    )
    assert "model.fixed_decay.max_slope = 0.5" in of_runs and "Slope of the first query group" in of_runs
    assert "relu_squared.scale = 1" in of_recipes and "Factor of the squares" in of_recipes


def notes(*overrides: str) -> list[str]:
    config = to_run_config(compose_run(["model=tiny_hybrid", "dry_run=true", *overrides]))
    return [each.describe() for each in unread_settings(config)]


def test_without_a_layer_that_reads_them_they_get_a_note() -> None:
    (note,) = notes("model.fixed_decay.max_slope=0.7")
    reason = "the model has no linear attention layers of fixed decay"
    assert note == f"model.fixed_decay.max_slope=0.7 has no effect: {reason}"
    assert notes("model.fixed_decay.max_slope=0.7", "model.mixers=[fixed_decay,swa]") == []


def test_in_a_line_of_layers_they_have_letters_of_their_own() -> None:
    overrides = ["model=tiny_hybrid", "dry_run=true", "model.mixers=[full,fixed_decay]"]
    run = to_run_config(compose_run([*overrides, "model.feed_forwards=[dense,relu_squared]"]))
    words, legend = layer_letters(run.model)
    assert words == ["F", "Ir", "F", "Ir"]
    assert legend == {"F": "full", "I": "fixed_decay", "r": "relu_squared"}
