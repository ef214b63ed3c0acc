"""Lists of layers: repeated, or, with ... behind their last entry, gone on with it."""

from __future__ import annotations

import pytest

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.same_architecture import check_same_weights
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.errors import ConfigurationError
from tests.config.small_model import small_model


def test_the_last_entry_goes_on_where_a_list_says_so():
    model = small_model(
        num_layers=5, mixers=["full", ["gla", "swa"], "..."], feed_forwards=["dense", "moe", "..."]
    )
    check_model(model)
    assert model.layer_mixers() == [("full",), *[("gla", "swa")] * 4]
    assert model.layer_feed_forwards() == ["dense", *["moe"] * 4]
    assert len(layers(model)) == 5


def test_a_model_of_fewer_layers_takes_the_first_entries():
    model = small_model(num_layers=2, mixers=["full"], feed_forwards=["dense", "moe", "dense", "..."])
    check_model(model)
    assert model.layer_feed_forwards() == ["dense", "moe"]


def test_without_it_a_list_is_repeated_and_must_not_be_longer_than_the_model():
    assert small_model(num_layers=3, mixers=["gla", "swa"]).layer_mixers() == [("gla",), ("swa",), ("gla",)]
    with pytest.raises(ConfigurationError, match="list at most one a layer"):
        check_model(small_model(num_layers=2, mixers=["gla", "swa", "full"]))


@pytest.mark.parametrize("mixers", [["..."], ["...", "gla"], ["gla", "...", "swa"]])
def test_it_stands_behind_the_last_entry_only(mixers):
    with pytest.raises(ConfigurationError, match=r"model.mixers has \.\.\. where it says nothing"):
        check_model(small_model(num_layers=4, mixers=mixers))


def test_two_ways_to_write_the_same_layers_are_the_same_architecture():
    short = small_model(num_layers=4, mixers=["full"], feed_forwards=["dense", "moe", "..."])
    long = small_model(num_layers=4, mixers=["full"], feed_forwards=["dense", "moe", "moe", "moe"])
    check_same_weights(short, long, "checkpoint.load=x")


def test_the_command_line_takes_it():
    arguments = ["model=tiny_hybrid", "dry_run=true", "model.feed_forwards=[dense,moe,...]"]
    run = to_run_config(compose_run(arguments))
    assert run.model.layer_feed_forwards() == ["dense", "moe", "moe", "moe"]


def test_the_published_layers_of_the_76b_are_those_of_the_report():
    """Section 2: dense feed-forwards in layers 1, 2, 3, 5, 7, 9 and 11 of 28."""
    model = to_run_config(compose_run(["model=spikingbrain_76b", "dry_run=true"])).model
    dense = [number for number, name in enumerate(model.layer_feed_forwards(), 1) if name == "dense"]
    assert dense == [1, 2, 3, 5, 7, 9, 11] and model.num_layers == 28
