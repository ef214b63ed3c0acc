"""Layers as kinds: their weights, what ranks hold of them, and branches in any combination."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod
from typing import Any

import pytest

from spikingbrain_train.architecture.branches import branch_names, in_order, initial_branch_weights
from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.layers import Layer, layers, model_weights, unchanged_models
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.model_checks import check_kinds
from spikingbrain_train.architecture.weights import ONE_RANK, Copies, Split, Weight
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import LayersConfig, ModelConfig, ParallelHybridConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.plugins import load_plugins
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.errors import ConfigurationError

BATCH = ("stage.seq_length=64", "stage.train_iters=1", "stage.global_batch_size=1", "dry_run=true")


def model(choice: str) -> ModelConfig:
    return to_run_config(compose_run([f"model={choice}", *BATCH])).model


def test_a_weight_is_counted_over_all_ranks_on_one_and_per_token() -> None:
    routed = Weight(
        "experts.linear_fc1.weight",
        ("gate", "up"),
        ((6, 4), (6, 4)),
        "routed experts",
        Split.experts,
        active=(2, 8),
        copies=Copies(8, routed=True, channel_axis=0),
    )
    assert routed.shape == (8, 12, 4) and routed.numel == 8 * 12 * 4
    assert routed.active_numel == routed.matrix_numel == 2 * 12 * 4
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1
    )
    assert routed.numel_on_rank(parallel) == 2 * 12 * 4
    assert routed.numel_on_rank(ONE_RANK) == routed.numel


def test_shared_experts_lie_side_by_side() -> None:
    down = Weight("fc2", ("down",), ((4, 6),), "", copies=Copies(3, routed=False, channel_axis=1))
    assert down.shape == (4, 18)


def test_of_models_that_do_not_change_weights_are_listed_once() -> None:
    narrow = model("tiny_hybrid")
    wide = replace(narrow, ffn_hidden_size=2 * narrow.ffn_hidden_size)
    with unchanged_models():
        listed = {id(each): layers(each)[0].weights(each) for each in (narrow, wide)}
        assert all(layers(each)[0].weights(each) is listed[id(each)] for each in (narrow, wide))
    assert listed[id(narrow)] == layers(narrow)[0].weights(narrow) != listed[id(wide)]
    narrow.ffn_hidden_size *= 2  # behind the block models may change again
    assert layers(narrow)[0].weights(narrow) == listed[id(wide)]


@pytest.mark.parametrize("choice", ["tiny_hybrid", "tiny_76b", "spikingbrain_76b"])
def test_every_weight_of_a_model_has_one_name_and_the_shapes_of_its_parts(choice: str) -> None:
    network = model(choice)
    weights = [weight for _, weight in model_weights(network)]
    assert len({weight.name for weight in weights}) == len(weights)
    for weight in weights:
        assert len(weight.roles) == len(weight.shapes)
        if weight.copies is None:
            assert weight.numel == sum(prod(shape) for shape in weight.shapes)


def test_branches_are_called_by_family_or_by_kind_where_two_share_one() -> None:
    full, window, gla = MIXERS["full"], MIXERS["swa"], MIXERS["gla"]
    assert branch_names(in_order([gla, window])) == ["softmax", "linear"]
    assert in_order([gla, window]) == in_order([window, gla]) == (window, gla)
    assert branch_names(in_order([window, full])) == ["full", "swa"]


def test_any_two_mixers_make_a_layer_with_a_norm_each_and_their_weights() -> None:
    network = model("tiny_76b")
    full, window, gla = MIXERS["full"], MIXERS["swa"], MIXERS["gla"]
    for pair in ((full, gla), (window, gla), (window, full)):
        layer = Layer(in_order(pair), FEED_FORWARDS["dense"])
        own = sum(weight.numel for kind in pair for weight in kind.weights(network))
        whole = sum(weight.numel for weight in layer.mixer_weights(network))
        assert whole == own + 2 * network.hidden_size + 2


def test_branch_weights_start_as_the_source() -> None:
    full, window, gla = MIXERS["full"], MIXERS["swa"], MIXERS["gla"]
    settings = ParallelHybridConfig(init_softmax_weight=1.0, init_linear_weight=0.25)
    assert initial_branch_weights(settings, [window, gla]) == [1.0, 0.25]
    assert initial_branch_weights(settings, [full, window]) == [0.5, 0.5]
    assert initial_branch_weights(settings, [gla, gla]) == [0.5, 0.5]


@pytest.mark.parametrize("mixers", [["gla", "sva"], [["gla", "sva"]]])
def test_an_unknown_mixer_of_a_model_or_a_conversion_is_named(mixers: list[Any]) -> None:
    for config in (ModelConfig(mixers=mixers), ConversionConfig(mixers=mixers)):
        with pytest.raises(ConfigurationError, match=r"names sva, which is no mixer; did you mean swa\?"):
            check_kinds(config)


def test_an_old_name_of_a_layer_of_branches_is_refused_with_how_it_is_written_now() -> None:
    with pytest.raises(ConfigurationError, match=r"mixers\[1\]=gla_full is written \[gla,full\] now"):
        check_fields(LayersConfig(mixers=["gla", "gla_full"]), "model.")


@pytest.mark.parametrize("entry", [[], ["gla"], [["gla", "swa"]], 3])
def test_an_entry_is_a_name_or_several(entry: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"mixers\[0\]=.* does not fit: it takes a mixer's name"):
        check_fields(LayersConfig(mixers=[entry]), "model.")


def test_branches_are_of_different_kinds() -> None:
    with pytest.raises(ConfigurationError, match=r"mixers\[0\]=\[gla,gla\] names a mixer twice"):
        check_fields(LayersConfig(mixers=[["gla", "gla"]]), "model.")


def test_an_unknown_kind_is_one_sentence_that_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match=r"model\.mixers names rwkv.*known are full, gdn, gla, mamba"
    ):
        MIXERS["rwkv"]
    with pytest.raises(ConfigurationError, match=r"model\.feed_forwards names relu2.*dense, moe"):
        FEED_FORWARDS["relu2"]


def test_a_registry_knows_its_kinds_whatever_was_imported_before() -> None:
    for names, room in (("full, gdn, gla, mamba, swa", "mixers"), ("dense, moe, no_mlp", "feed_forwards")):
        code = (
            f"from spikingbrain_train.architecture.{room} import {room.upper()} as kinds; "
            "print(', '.join(sorted(kind.name for kind in kinds)))"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == names


def test_a_plugin_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"plugins names no_such_package\.mixers"):
        load_plugins(["no_such_package.mixers"])
