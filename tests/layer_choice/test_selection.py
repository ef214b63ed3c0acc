"""How many layers, which may be swapped, and by what: from the words of a command line, without torch."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.load import load_conversion
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.layer_choice.selection import (
    Pair,
    candidates,
    cheapest,
    evenly_spaced,
    number_of_swaps,
    pair_of,
)


def test_the_recipe_says_what_layers_become() -> None:
    recipe = load_conversion("spikingbrain_7b")
    assert pair_of(recipe, None, None) == Pair("gla", "swa")
    assert pair_of(recipe, None, "full") == Pair("gla", "full")
    two = pair_of(load_conversion("spikingbrain_76b"), None, "swa")
    assert two == Pair(["gla", "swa"], "swa")
    assert two.mixers(3, [1]) == ["swa", ["gla", "swa"], "swa"]


@pytest.mark.parametrize(
    ("to", "kept", "sentence"),
    [
        ("swa", None, "--to swa computes with the source's weights"),
        (None, "gla", "--kept gla does not take the source's weights"),
        ("[]", None, r"--to \[\] is no mixer"),
        ("3", None, "--to 3 is no mixer"),
        ("glaa", None, "glaa"),
    ],
)
def test_a_mixer_that_does_not_fit_its_part_is_refused(
    to: str | None, kept: str | None, sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        pair_of(load_conversion("spikingbrain_7b"), to, kept)


def test_a_recipe_that_swaps_nothing_asks_for_the_mixer() -> None:
    with pytest.raises(ConfigurationError, match="name the mixer of swapped ones with --to"):
        pair_of(load_conversion("dense"), None, None)
    with pytest.raises(ConfigurationError, match="with --kept"):
        pair_of(load_conversion("spikingbrain_76b"), None, None)


def test_swap_is_a_number_or_a_share_of_all_layers() -> None:
    assert number_of_swaps("15", 30, 28) == number_of_swaps("0.5", 30, 28) == 15
    assert number_of_swaps("1", 30, 28) == 1
    for wrong in ("0", "-1", "1.0", "1.5", "0.0", "half", "nan", "0.x", "1e3"):
        with pytest.raises(ConfigurationError, match=f"--swap {wrong} is no number of layers"):
            number_of_swaps(wrong, 30, 28)
    with pytest.raises(ConfigurationError, match="--swap 29 is 29 layers, but 28 of 30 may be swapped"):
        number_of_swaps("29", 30, 28)


def test_layers_that_must_stay_are_no_candidates() -> None:
    assert candidates("", 4) == [0, 1, 2, 3] and candidates("0, 3", 4) == [1, 2]
    for wrong in ("4", "-1", "x"):
        with pytest.raises(ConfigurationError, match=f"--keep {wrong} names the layer {wrong}"):
            candidates(wrong, 4)
    with pytest.raises(ConfigurationError, match="leaves no layer to swap"):
        candidates("0,1", 2)


def test_the_control_is_every_second_layer_for_half_of_them() -> None:
    assert evenly_spaced(range(6), 3) == [0, 2, 4]
    assert evenly_spaced([1, 2, 3, 4], 2) == [1, 3]


def test_of_equal_costs_the_earlier_layer_is_taken() -> None:
    assert cheapest({0: 0.3, 1: 0.1, 2: 0.1, 3: 0.05}, 2) == [1, 3]
