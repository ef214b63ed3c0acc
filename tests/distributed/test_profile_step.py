"""A profiled step: its parts add up to it, and hold what torch counts in other ways and what formulas say.

Sums of the times of one step are exact but for rounding to nanoseconds (1e-3 of the step is a hundred times
that); numbers of FLOPs are integers and compared as such.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from tests.distributed import small_runs
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, zero

SEQUENCES, LENGTH = 4, 32
STAGE = StageConfig(train_iters=10, seq_length=LENGTH, global_batch_size=SEQUENCES, micro_batch_size=1)
PARTS_76B = {
    "embedding",
    "mixer [gla,swa]",
    "mixer [gla,full]",
    "mixer gla",
    "mixer swa",
    "mixer full",
    "feed-forward dense",
    "feed-forward moe",
    "feed-forward moe: router",
    "feed-forward moe: experts",
    "feed-forward moe: shared experts",
    "norms",
    "output and loss",
    "optimizer",
    "sums of gradients",
    "waiting for data",
    "communication",  # alone, too: the gradients' norm
    "rest",
}


@dataclass
class Seen:
    """What one rank found in its own events, beside what the profile says."""

    values: dict[str, Any] | None
    own_seconds: float
    """Of all events inside the steps, as torch's table of averages adds them up."""
    counted_flops: float
    """Of the matrix products of the same step, by a dispatch mode."""
    leftovers: list[str]
    """Attributes of the trainer's modules that the ranges have left."""


def profiled(groups: Any, config: RunConfig, output: Path, ranks: tuple[int, ...] | None = None) -> Seen:
    """Runs on every rank."""
    from torch.utils.flop_counter import FlopCounterMode

    from spikingbrain_train.training.profiling import profile as module
    from spikingbrain_train.training.trainer import Trainer

    trainers: list[Trainer] = []
    profilers: list[Any] = []

    class Kept(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            trainers.append(self)
            self.attributes_before = attributes(self)

    def kept_profiler(**options: Any) -> Any:
        profilers.append(whole(**options))
        return profilers[-1]

    # What a chunk of GLA multiplies depends on its gates: the weights stay, so that the step can be repeated.
    config = replace(config, optimizer=replace(config.optimizer, lr=1e-12))
    whole = module.profile
    module.Trainer, module.profile = Kept, kept_profiler  # type: ignore[misc]
    try:
        found = module.profile_step_on(groups, module.Request(config, output, 1, 1, ranks))
    finally:
        module.Trainer, module.profile = Trainer, whole  # type: ignore[misc]
    (trainer,) = trainers
    leftovers = sorted(attributes(trainer) - trainer.attributes_before)  # type: ignore[attr-defined]
    # Not while it is profiled: the profiler sees an operator again behind a dispatch mode.
    batches = trainer.data.train_batches(trainer.state.consumed_samples - SEQUENCES)
    with FlopCounterMode(display=False) as counter:
        trainer.compute_gradients(batches)
    counts = counter.get_flop_counts()["Global"]
    products = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}
    own = sum(
        each.self_cpu_time_total
        for profiler in profilers
        for each in profiler.key_averages()
        if not each.key.startswith("gloo:")
    )
    return Seen(
        None if found is None else found.as_values(),
        own / 1e6,
        sum(number for operator, number in counts.items() if str(operator) in products),
        leftovers,
    )


def attributes(trainer: Any) -> set[str]:
    """Of single objects, in the place of a method of their class."""
    owners = [trainer.engine, *trainer.model.modules()]
    return {
        f"{type(each).__name__}.{name}"
        for each in owners
        for name in vars(each)
        if callable(getattr(type(each), name, None))
    }


def parts(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in values["parts"]}


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Seen, Path]:
    folder = tmp_path_factory.mktemp("profile")
    config = small_runs.run_config(folder / "run", text, model=small_runs.MODEL_76B, stage=STAGE)
    (seen,) = ranks.run(profiled, config, folder / "profile", world_size=1, parallel=ParallelConfig())
    return seen, folder


def test_parts_add_up_to_the_step(one_rank: tuple[Seen, Path]) -> None:
    values = one_rank[0].values
    assert values is not None
    assert sum(part["seconds"] for part in values["parts"]) == pytest.approx(values["seconds"], rel=1e-3)
    assert sum(part["share"] for part in values["parts"]) == pytest.approx(1.0, rel=1e-3)
    assert parts(values).keys() == PARTS_76B


def test_torch_s_own_table_has_the_same_total(one_rank: tuple[Seen, Path]) -> None:
    """key_averages() also has what the profiler saw between its start and the step: some microseconds."""
    seen, _ = one_rank
    assert seen.values is not None
    assert seen.own_seconds == pytest.approx(seen.values["seconds"], rel=1e-2)


def test_products_are_those_that_a_dispatch_mode_counts(one_rank: tuple[Seen, Path]) -> None:
    seen, _ = one_rank
    assert seen.values is not None
    assert sum(part["product_flops"] for part in seen.values["parts"]) == seen.counted_flops


def dense_flops(passes: int) -> int:
    """Of the three matrices of MODEL's dense feed-forwards in a step: two of four layers in MODEL_76B."""
    model = small_runs.MODEL
    return passes * 2 * 3 * model.hidden_size * model.ffn_hidden_size


def test_backward_products_belong_to_the_part_that_made_them(one_rank: tuple[Seen, Path]) -> None:
    """One forward product and two backward ones of each matrix; sinks take places of the sequence."""
    values = one_rank[0].values
    assert values is not None
    found, positions = parts(values), LENGTH + small_runs.MODEL_76B.num_sink_tokens
    assert found["feed-forward dense"]["product_flops"] == 2 * SEQUENCES * positions * dense_flops(3)
    assert found["feed-forward dense"]["backward"] > 0
    for name in ("mixer gla", "mixer swa", "norms", "feed-forward moe: experts", "output and loss"):
        assert found[name]["backward"] > 0, name
    assert found["optimizer"]["backward"] == 0


def test_what_is_computed_again_is_told_apart_too(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    parallel = ParallelConfig(recompute=Recompute.full)
    config = small_runs.run_config(tmp_path / "run", text, stage=STAGE, parallel=parallel)
    (seen,) = ranks.run(profiled, config, tmp_path / "profile", world_size=1, parallel=parallel)
    assert seen.values is not None
    found = parts(seen.values)
    assert found["feed-forward dense"]["product_flops"] == 4 * SEQUENCES * LENGTH * dense_flops(4)
    assert sum(part["product_flops"] for part in seen.values["parts"]) == seen.counted_flops


def test_files_are_whole_and_nothing_else_is_left(one_rank: tuple[Seen, Path]) -> None:
    seen, folder = one_rank
    assert [path.name for path in folder.rglob("*")] == ["profile", "trace.json.gz"]
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = {event["name"] for event in events if event["name"].startswith("part: ")}
    assert named == {f"part: {name}" for name in PARTS_76B - {"rest"}}
    assert seen.leftovers == []


TOPOLOGIES = {name: small_runs.TOPOLOGIES[name] for name in ("TP 2", "PP 2 of 2 virtual stages", "CP 2")}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_ranks_that_share_a_model(name: str, ranks: RankPool, tmp_path: Path, text: Path) -> None:
    world_size, parallel = TOPOLOGIES[name]
    config = small_runs.run_config(tmp_path / "run", text, stage=STAGE, parallel=parallel)
    first, second = ranks.run(
        profiled, config, tmp_path / "profile", world_size=world_size, parallel=parallel
    )
    assert first.values is not None and second.values is None
    found, values = parts(first.values), first.values
    assert values["ranks"] == (0, 1)
    assert sum(part["seconds"] for part in values["parts"]) == pytest.approx(values["seconds"], rel=1e-3)
    assert found["communication"]["seconds"] > 0
    assert found["mixer gla"]["slowest"] >= found["mixer gla"]["seconds"] > 0
    mean = (first.counted_flops + second.counted_flops) / 2
    assert sum(part["product_flops"] for part in values["parts"]) == mean
    assert first.leftovers == second.leftovers == []


def test_one_of_several_ranks_alone(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    config = small_runs.run_config(tmp_path / "run", text, stage=STAGE, parallel=parallel)
    first, second = ranks.run(profiled, config, tmp_path / "profile", (1,), world_size=2, parallel=parallel)
    assert first.values is not None
    assert first.values["ranks"] == (1,)
    found = parts(first.values)
    assert "embedding" not in found and "output and loss" in found  # the last stage
    assert sum(part["product_flops"] for part in first.values["parts"]) == second.counted_flops


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_stages_with_a_teacher(
    kind: str, ranks: RankPool, tmp_path: Path, text: Path, dense_checkpoint: Path
) -> None:
    stage = replace(STAGE, kind=kind, teacher=str(dense_checkpoint))
    config = small_runs.run_config(tmp_path / "run", text, stage=stage)
    (seen,) = ranks.run(profiled, config, tmp_path / "profile", world_size=1, parallel=ParallelConfig())
    assert seen.values is not None
    found = parts(seen.values)
    assert found["teacher"]["seconds"] > 0 and found["mixer gla"]["backward"] > 0
    if kind == "distill":  # an align stage compares mixers inside its teacher's forward pass
        assert found["teacher"]["backward"] == 0
    assert sum(part["product_flops"] for part in seen.values["parts"]) == seen.counted_flops


@pytest.mark.parametrize(
    "parallel", [case(each, engine=each.engine, name=each.engine.name) for each in (zero(2), fsdp())]
)
def test_under_other_engines(parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path) -> None:
    config = small_runs.run_config(tmp_path / "run", text, stage=STAGE, parallel=parallel)
    first, _ = ranks.run(profiled, config, tmp_path / "profile", world_size=2, parallel=parallel)
    assert first.values is not None
    assert parts(first.values)["optimizer"]["seconds"] > 0
    assert sum(part["seconds"] for part in first.values["parts"]) == pytest.approx(
        first.values["seconds"], rel=1e-3
    )
