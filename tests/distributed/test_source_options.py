"""What sources bring along computes the same on any ranks: biases, rotary scaling, renormalised experts.

Bound and reasons as in tests/distributed/test_gradients.py.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest

from spikingbrain_train.config.model import ModelConfig, MoEConfig, RouterWeights
from spikingbrain_train.config.parallel import ParallelConfig, ParallelLinearBackend
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from tests.distributed.gradients import CASES, LENGTH, Case, Shard, assemble, loss_and_gradients
from tests.distributed.pool import RankPool
from tests.distributed.test_gradients import TOPOLOGIES, Result, assert_equal, result

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

_7B = CASES["GLA, low-rank gate"].model
_SOFTMAX = replace(_7B, mixers=["swa", "full"])
_ORIGINAL = LENGTH // 4
_HALF = _7B.kv_channels // 2
SCALINGS: Mapping[RopeType, RopeScalingConfig] = {
    RopeType.linear: RopeScalingConfig(RopeType.linear, factor=4.0),
    RopeType.dynamic: RopeScalingConfig(
        RopeType.dynamic, factor=2.0, original_max_position_embeddings=_ORIGINAL
    ),
    RopeType.yarn: RopeScalingConfig(RopeType.yarn, factor=4.0, original_max_position_embeddings=_ORIGINAL),
    RopeType.llama3: RopeScalingConfig(
        RopeType.llama3, factor=8.0, original_max_position_embeddings=_ORIGINAL
    ),
    RopeType.longrope: RopeScalingConfig(
        RopeType.longrope,
        factor=4.0,
        original_max_position_embeddings=_ORIGINAL,
        short_factor=[1.0 + 0.1 * number for number in range(_HALF)],
        long_factor=[1.0 + number for number in range(_HALF)],
    ),
}
"""Every kind, in texts four times as long as the original context."""
MODELS: Mapping[str, ModelConfig] = {
    "biases everywhere": replace(_7B, mixers=["gla", "swa"], add_output_bias=True, add_mlp_bias=True),
    "experts that add up to 1": replace(
        _SOFTMAX,
        feed_forwards=["moe"],
        moe=MoEConfig(num_experts=4, router_topk=2, norm_topk_prob=True, num_shared_experts=0),
    ),
    "experts that count whole": replace(
        _SOFTMAX,
        feed_forwards=["moe"],
        moe=MoEConfig(num_experts=4, router_topk=2, router_weights=RouterWeights.ones, num_shared_experts=0),
    ),
    "experts by a router with a hidden layer and biases": replace(
        _SOFTMAX,
        feed_forwards=["moe"],
        moe=MoEConfig(num_experts=4, router_topk=2, router_hidden_size=6, router_bias=True),
    ),
    **{f"rotary {kind.value}": replace(_SOFTMAX, rope_scaling=each) for kind, each in SCALINGS.items()},
    "rotary dynamic, documents": replace(_SOFTMAX, rope_scaling=SCALINGS[RopeType.dynamic]),
}
PLACES: Mapping[str, tuple[str, ...]] = {
    "biases everywhere": (
        *("TP 2", "TP 2 + sequence parallel", "PP 2", "CP 2, all-gather and halo"),
        "TP 2 + sequence parallel x CP 2",
    ),
    "experts that count whole": ("TP 2 + sequence parallel", "PP 2 x EP 2", "EP 2 x CP 2"),
    "experts by a router with a hidden layer and biases": ("TP 2 + sequence parallel", "PP 2 x EP 2"),
    "experts that add up to 1": ("TP 2 + sequence parallel", "EP 2", "PP 2 x EP 2", "EP 2 x CP 2"),
}
"""Where each is tried; rotary kinds where sequences or layers are split."""
_SPLIT = ("PP 2", "CP 2, all-gather and halo", "CP 2, all-scan and Ulysses")
PAIRS = [(model, place) for model in MODELS for place in PLACES.get(model, _SPLIT)]


def case_of(model: str) -> Case:
    return Case(MODELS[model], packed="documents" in model)


@pytest.fixture(scope="module")
def on_one_rank(ranks: RankPool) -> dict[str, Result]:
    return {model: result(ranks, case_of(model), ParallelConfig()) for model in MODELS}


@pytest.mark.parametrize(("model", "place"), PAIRS, ids=[f"{model}: {place}" for model, place in PAIRS])
def test_loss_and_every_gradient_equal_those_of_one_rank(
    ranks: RankPool, on_one_rank: dict[str, Result], model: str, place: str
) -> None:
    assert_equal(result(ranks, case_of(model), TOPOLOGIES[place]), on_one_rank[model])


def test_each_of_them_changes_what_is_computed(ranks: RankPool, on_one_rank: dict[str, Result]) -> None:
    """Else the comparisons above would hold of models without them."""
    plain, _ = result(ranks, Case(_SOFTMAX), ParallelConfig())
    losses = [loss for model, (loss, _) in on_one_rank.items() if model.startswith("rotary")]
    assert len({round(loss, 6) for loss in (plain, *losses)}) == len(losses) + 1
    given = MODELS["experts that add up to 1"]
    as_they_come = replace(given, moe=replace(given.moe, norm_topk_prob=False))
    loss, _ = result(ranks, Case(as_they_come), ParallelConfig())
    assert abs(loss - on_one_rank["experts that add up to 1"][0]) > 1e-4
    _, gradients = on_one_rank["biases everywhere"]
    assert {name.rsplit(".", 2)[-2] for name in gradients if name.endswith(".bias")} >= {
        *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
    }


def signature_of_transformer_engine(name: str) -> dict[str, bool]:
    """Keywords of one of megatron-core's classes over Transformer Engine -> whether they must be given.

    Read from its source: the module cannot be imported without Transformer Engine.
    """
    source = files("megatron.core.extensions").joinpath("transformer_engine.py").read_text()
    (found,) = [each for each in ast.parse(source).body for each in _classes(each) if each.name == name]
    (begin,) = [each for each in found.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    return {
        argument.arg: default is None
        for argument, default in zip(begin.args.kwonlyargs, begin.args.kw_defaults, strict=True)
    }


def _classes(node: ast.stmt) -> list[ast.ClassDef]:
    """Classes of a module, those behind an ``if`` included."""
    if isinstance(node, ast.ClassDef):
        return [node]
    return [found for each in getattr(node, "body", []) for found in _classes(each)]


def as_with_transformer_engine(
    groups: ProcessGroups, case: Case, parallel: ParallelConfig
) -> tuple[float, list[Shard]]:
    """megatron-core's linears, called as those over Transformer Engine have to be."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from spikingbrain_train.models import kernels
    from spikingbrain_train.models.linears import parallel_linears

    built: set[str] = set()

    def strict(plain: Any, name: str) -> type:
        keywords = signature_of_transformer_engine(name)

        def __init__(self: Any, input_size: int, output_size: int, **given: Any) -> None:
            assert given.keys() <= keywords.keys(), f"{name} takes no {given.keys() - keywords.keys()}"
            missing = {keyword for keyword, needed in keywords.items() if needed} - given.keys()
            assert not missing, f"{name} needs {missing}"
            built.add(name)
            plain.__init__(self, input_size, output_size, **given)

        return type(name, (plain,), {"__init__": __init__})

    backend, resolve = ParallelLinearBackend.transformer_engine, kernels.resolve_kernels
    classes = (
        strict(ColumnParallelLinear, "TEColumnParallelLinear"),
        strict(RowParallelLinear, "TERowParallelLinear"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parallel_linears._COLUMN_AND_ROW, backend, lambda: classes)
        patch.setattr(
            kernels, "resolve_kernels", lambda *given: replace(resolve(*given), parallel_linear=backend)
        )
        found = loss_and_gradients(groups, case, parallel)
    assert len(built) == 2
    return found


def test_biases_reach_linears_of_transformer_engine_in_its_words(
    ranks: RankPool, on_one_rank: dict[str, Result]
) -> None:
    """Its own arithmetic is not run here, which needs a GPU; the call is, and what comes back of it."""
    parallel = TOPOLOGIES["TP 2 + sequence parallel"]
    per_rank = ranks.run(
        *(as_with_transformer_engine, case_of("biases everywhere"), parallel), world_size=2, parallel=parallel
    )
    found = per_rank[0][0], assemble([shards for _, shards in per_rank])
    assert_equal(found, on_one_rank["biases everywhere"])
