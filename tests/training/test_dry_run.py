"""A dry run builds what the plan says, for any rank, in seconds and without memory for it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.planner import Plan, launched_world_size, plan_run
from spikingbrain_train.training.dry_run import RankShare, _group_ranks, _reduced_world, build_share

EXPERIMENTS = [f"spikingbrain_{size}_{length}" for size in ("7b", "76b") for length in ("8k", "32k", "128k")]
PEAK_BYTES = 4e9  # a build takes half a gigabyte, nearly all of it torch
SECONDS = 30  # a build takes less than one second on an idle core

# (degrees, world size)
TOPOLOGIES = [
    (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2), 16),
    (ParallelConfig(expert_model_parallel_size=4, pipeline_model_parallel_size=2), 16),
    (
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            context_parallel_size=2,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
        ),
        32,
    ),
    (ParallelConfig(context_parallel_size=3, expert_model_parallel_size=2), 12),
    (ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 2),
]


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Another process for all builds, since a build patches megatron-core and joins a world."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_build, plan_of("model=tiny_76b")).result()  # imports torch and megatron-core
        yield pool


def plan_of(*overrides: str, parallel: ParallelConfig | None = None, world_size: int | None = None) -> Plan:
    config: RunConfig = to_run_config(compose_run([*overrides, "dry_run=true"]))
    config.parallel = parallel or config.parallel
    world_size = world_size or launched_world_size(config)
    check_run_config(config, world_size)
    return plan_run(config, world_size)


def _build(plan: Plan, rank: int = 0) -> tuple[RankShare, float, int]:
    plan.config.dry_run_rank = rank
    start = time.perf_counter()
    share = build_share(plan)
    seconds = time.perf_counter() - start
    return share, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("cluster", ["nvidia", "metax"])
@pytest.mark.parametrize("choice", EXPERIMENTS)
def test_every_experiment_is_built_at_its_true_size(process, choice, cluster, monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    plan = plan_of(f"experiment={choice}", f"cluster={cluster}")
    stages = plan.config.parallel.pipeline_model_parallel_size
    for rank in (0, plan.world_size // 2, plan.world_size - 1):
        share, seconds, peak = process.submit(_build, plan, rank).result()
        assert seconds < SECONDS and peak < PEAK_BYTES
        stage = plan.stages[rank * stages // plan.world_size]
        assert [layer.layer for layer in share.layers] == list(chain.from_iterable(stage.virtual_stages))
        assert [layer.kind for layer in share.layers] == stage.kinds
        assert share.parameters == stage.parameters and share.memory == stage.memory


@pytest.mark.parametrize(("parallel", "world_size"), TOPOLOGIES)
def test_every_rank_of_a_small_76b_is_built_under_any_topology(process, parallel, world_size) -> None:
    batch = ("stage.global_batch_size=48", "stage.seq_length=40")
    plan = plan_of("model=tiny_76b", *batch, parallel=parallel, world_size=world_size)
    for rank in range(world_size):
        share, _, _ = process.submit(_build, plan, rank).result()
        assert share.rank == rank


def test_weights_that_are_not_trained_are_built_as_planned(process) -> None:
    options = ("gate=fixed", "qk_norm=true", "rotary=true", "output_gate=true", "num_query_groups=4")
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    plan = plan_of(
        *("model=tiny_hybrid", "stage.global_batch_size=2", "stage.seq_length=40"),
        *(f"model.gla.{option}" for option in options),
        parallel=parallel,
        world_size=2,
    )
    share, _, _ = process.submit(_build, plan, 1).result()
    assert share.parameters == plan.stages[0].parameters


def _ranks_in_groups(plan: Plan, rank: int) -> tuple[dict[str, int], dict[str, int]]:
    from megatron.core import parallel_state

    with _reduced_world(plan, rank):
        formed = {
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
            "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
            "context": parallel_state.get_context_parallel_rank(),
            "expert": parallel_state.get_expert_model_parallel_rank(),
            "expert tensor": parallel_state.get_expert_tensor_parallel_rank(),
        }
    return formed, _group_ranks(plan, rank)


def _group_ranks_in_the_whole_world(plan: Plan) -> list[dict[str, int]]:
    """Every rank's place in the groups that megatron-core would form in the unreduced world."""
    from megatron.core.parallel_state import RankGenerator

    parallel, order = plan.config.parallel, "tp-cp-ep-dp-pp"
    stages = parallel.pipeline_model_parallel_size
    stage_ranks = plan.world_size // stages
    dense = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    expert = parallel.expert_tensor_size, parallel.expert_model_parallel_size
    data, expert_data = stage_ranks // (dense[0] * dense[1]), stage_ranks // (expert[0] * expert[1])
    dense_groups = RankGenerator(tp=dense[0], cp=dense[1], ep=1, dp=data, pp=stages, order=order)
    expert_groups = RankGenerator(tp=expert[0], cp=1, ep=expert[1], dp=expert_data, pp=stages, order=order)
    names = {
        "data": (dense_groups, "dp"),
        "tensor": (dense_groups, "tp"),
        "pipeline": (dense_groups, "pp"),
        "context": (dense_groups, "cp"),
        "expert": (expert_groups, "ep"),
        "expert tensor": (expert_groups, "tp"),
    }
    places: list[dict[str, int]] = [{} for _ in range(plan.world_size)]
    for name, (generator, token) in names.items():
        for group in generator.get_ranks(token):
            for place, rank in enumerate(group):
                places[rank][name] = place
    return places


@pytest.mark.parametrize(("parallel", "world_size"), TOPOLOGIES)
def test_a_rank_keeps_its_places_in_the_reduced_world(process, parallel, world_size) -> None:
    batch = ("stage.global_batch_size=48", "stage.seq_length=40")
    plan = plan_of("model=tiny_76b", *batch, parallel=parallel, world_size=world_size)
    whole = process.submit(_group_ranks_in_the_whole_world, plan).result()
    for rank in range(world_size):
        formed, places = process.submit(_ranks_in_groups, plan, rank).result()
        assert places == whole[rank]
        assert formed == {name: place for name, place in places.items() if name != "data"}


@pytest.mark.parametrize(
    ("model", "change", "sentence"),
    [
        ("tiny_76b", "parameters", "does not describe the modules"),
        ("tiny_76b", "kinds", "the feed-forward of layer 0 was built with .* but moe is described with"),
        ("tiny_hybrid", "kinds", "the mixer of layer 0 was built with .* but full is described with"),
    ],
)
def test_a_plan_that_is_not_what_was_built_is_an_error(process, model, change, sentence) -> None:
    plan = plan_of(f"model={model}")
    (stage,) = plan.stages
    wrong = {"parameters": stage.parameters + 1, "kinds": stage.kinds[::-1]}[change]
    plan = dataclasses.replace(plan, stages=[dataclasses.replace(stage, **{change: wrong})])
    with pytest.raises(RuntimeError, match=sentence):
        process.submit(_build, plan).result()


def test_an_evaluator_that_is_not_there_is_named(process) -> None:
    plan = plan_of("model=tiny_76b", "logging.evaluators=[nowhere.module.Evaluator]")
    with pytest.raises(ConfigurationError, match="logging.evaluators names nowhere.module.Evaluator, which"):
        process.submit(_build, plan).result()


def test_the_report_says_what_the_rank_holds(process) -> None:
    share, _, _ = process.submit(
        _build, plan_of("experiment=spikingbrain_76b_32k", "parallel=dp32_cp4_ep8_pp4"), 137
    ).result()
    text = share.render()
    for expected in (
        "137 of 512: data 2, tensor 0, pipeline 1, context 1, expert 1, expert tensor 0",
        "3,874,154,382 built on this rank",
        "12.72 B of the model's 76.88 B",
        "2 to 3 of each layer's 16",
    ):
        assert expected in text
    *_, last = text.partition("rank's layers")[2].splitlines()[3:]
    assert last.split()[:4] == ["13", "1", "[gla,full]", "moe"]
