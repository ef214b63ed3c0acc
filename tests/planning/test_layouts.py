"""The search of a layout against brute force, plans and what a run accepts."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.architecture.layers import layers as layers_of
from spikingbrain_train.architecture.layers import unchanged_models
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.parallel import EngineKind, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.fit import Fit, device_memory
from spikingbrain_train.planning.layer_work import ModelWork, recomputed_flops
from spikingbrain_train.planning.layouts.command_line import plan_parallel
from spikingbrain_train.planning.layouts.layout import Layout
from spikingbrain_train.planning.layouts.search import Search, check_search, search
from spikingbrain_train.planning.layouts.space import Rejections, layouts
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.step_time import EFFICIENCY, least_time, step_time
from spikingbrain_train.planning.topology import Network
from tests.planning.test_memory_of_a_step import RANKS, SPREAD

GPUS = 4


@cache
def run_of(*settings: str) -> RunConfig:
    return check_search(to_run_config(compose_run([*settings, "dry_run=true"])))


def small(model: str, memory_gib: float) -> RunConfig:
    """Four layers of a tiny model at 4k on two nodes of two GPUs, so slow that communication matters."""
    config = run_of(f"model={model}", "cluster=a800", "stage.seq_length=4096", "stage.global_batch_size=8")
    cluster = replace(
        config.cluster,
        gpus_per_node=2,
        memory_gib=memory_gib,
        peak_tflops=1.0,
        intra_node_gb_per_s=2.0,
        inter_node_gb_per_s=0.5,
    )
    model_config = replace(config.model, num_layers=4, max_position_embeddings=4096)
    return replace(config, model=model_config, cluster=cluster)


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to share layers out over stages."""
    cuts = itertools.combinations(range(1, total), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, total))) for cut in cuts]


def stages_to_try(work: ModelWork, pipeline: int, recompute: Recompute) -> set[tuple[int, ...]]:
    """Even stages, and those whose longest, then whose longest behind the first ..., is shortest."""
    parallel = replace(work.config.parallel, recompute=recompute)
    run = replace(work.config, parallel=parallel)
    flops = [3 * work.of_layers[layer].forward_flops + recomputed_flops(run, layer) for layer in work.layers]

    def longest(stages: tuple[int, ...]) -> tuple[float, ...]:
        bounds = (0, *itertools.accumulate(stages))
        of_stages = [sum(flops[a:b]) for a, b in itertools.pairwise(bounds)]
        of_stages[-1] += 3 * work.output_flops
        behind = [max(of_stages[first:]) for first in range(len(stages))]
        return tuple(itertools.chain(*zip(behind, stages, strict=True)))

    return {min(compositions(4, pipeline), key=longest), (4 // pipeline,) * pipeline}


@unchanged_models()
def by_brute_force(
    config: RunConfig, experts: int, zero: Sequence[int] = (), fsdp: Sequence[int] = ()
) -> dict[tuple[int, ...], float]:
    """Every setting that a run accepts and that fits: the shortest step of each split."""
    network, work = Network.of(config.cluster), ModelWork(config)
    device = device_memory(config.cluster, GPUS)
    assert device is not None
    timed: list[tuple[float, Layout, RunConfig]] = []
    degrees = itertools.product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 4) if experts else (1,))
    for tensor, pipeline, context, expert in degrees:
        if GPUS % (tensor * pipeline * context) or GPUS // pipeline % (expert * tensor):
            continue
        virtual = range(1, 4 // pipeline + 1) if pipeline > 1 else [1]
        engines: list[dict[str, int]] = [{}]
        if pipeline == expert == 1:
            engines += [{"fsdp": each} for each in fsdp]
        if tensor == pipeline == expert == 1:
            engines += [{"zero": each} for each in zero]
        options = itertools.product(
            (False, True), (False, True), Recompute, (1, 2, 4, 8), virtual, (0, 1), engines
        )
        for sequence, sharded, recompute, size, of_a_rank, number, engine in options:
            stages = sorted(stages_to_try(work, pipeline * of_a_rank, recompute))[0 if number else -1]
            split = (tensor, pipeline, context, expert, stages, sequence, sharded)
            layout = Layout(*split, recompute, size, of_a_rank, **engine)
            run = replace(layout.run(config, GPUS), dry_run=True)
            if run.stage.global_batch_size % (size * layout.replicas(GPUS)):
                continue
            timed.append((step_time(work, run, GPUS, network).seconds, layout, run))
    best: dict[tuple[int, ...], float] = {}
    for seconds, layout, run in sorted(timed, key=lambda each: each[0]):
        if layout.degrees in best:
            continue
        try:
            check_run_config(run, GPUS)
        except SpikingBrainError:
            continue
        if device.fit(plan_run(run, GPUS).fullest.memory.total) is Fit.fits:
            best[layout.degrees] = seconds
    return best


@pytest.mark.parametrize(("model", "memory_gib"), [("tiny_hybrid", 0.025), ("tiny_76b", 0.05)])
def test_the_search_finds_what_brute_force_finds(model: str, memory_gib: float) -> None:
    config = small(model, memory_gib)
    found = search(config, GPUS, 1000, EFFICIENCY)
    expected = by_brute_force(config, experts=4 if model == "tiny_76b" else 0)
    assert found.found and found.rejections.number
    assert {each.layout.degrees: each.time.seconds for each in found.found} == pytest.approx(expected)
    seconds = [each.time.seconds for each in found.found]
    assert seconds == sorted(seconds)
    everything = search(config, GPUS, 1000, EFFICIENCY, everything=True)
    assert [each.time.seconds for each in everything.found] == pytest.approx(seconds)


def test_the_search_finds_what_brute_force_finds_with_every_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where weights and their state are most of what ranks hold, and a bucket is a part of a layer."""
    for module in ("memory", "step_time"):
        monkeypatch.setattr(f"spikingbrain_train.planning.{module}.REDUCE_BUCKET", 1_000_000)
    config = small("tiny_hybrid", 0.2)
    config = replace(
        config, model=replace(config.model, hidden_size=512, ffn_hidden_size=2048, vocab_size=512)
    )
    found = search(config, GPUS, 1000, EFFICIENCY, engines=list(EngineKind))
    expected = by_brute_force(config, experts=0, zero=(1, 2, 3), fsdp=(2, 3))
    assert {each.layout.degrees: each.time.seconds for each in found.found} == pytest.approx(expected)
    assert {each.layout.engine for each in found.found} == {EngineKind.megatron, EngineKind.fsdp}
    for engine in (EngineKind.deepspeed, EngineKind.fsdp):
        alone = search(config, GPUS, 1000, EFFICIENCY, engines=[engine])
        assert alone.found and all(each.layout.engine is engine for each in alone.found)


@pytest.mark.parametrize("model", ["tiny_hybrid", "tiny_76b"])
def test_weights_are_listed_once_and_not_for_every_layout(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing them was most of a search. Each different layer asks its kinds once."""
    config = small(model, 0.05)
    asked: Counter[str] = Counter()
    kinds = {kind for layer in layers_of(config.model) for kind in (*layer.mixers, layer.feed_forward)}
    for kind, of_kind in {type(kind): type(kind).weights for kind in kinds}.items():

        def weights(self: Any, *given: Any, listed: Any = of_kind, **named: Any) -> Any:
            asked[self.name] += 1
            return listed(self, *given, **named)

        monkeypatch.setattr(kind, "weights", weights)
    found = search(config, GPUS, 3, EFFICIENCY)
    assert found.tried > 50 and asked.keys() == {kind.name for kind in kinds}
    different = set(layers_of(config.model))
    assert asked == {
        kind.name: sum(kind in (*layer.mixers, layer.feed_forward) for layer in different) for kind in kinds
    }


@pytest.mark.parametrize("model", ["tiny_hybrid", "tiny_76b"])
def test_no_layout_takes_less_than_the_bound_by_which_it_is_looked_at(model: str) -> None:
    config = small(model, 0.05)
    work, network = ModelWork(config), Network.of(config.cluster)
    for gpus in (1, GPUS):
        for layout in layouts(config, gpus, work, Rejections(), list(EngineKind), everything=True):
            run = layout.run(config, gpus)
            least, time = least_time(work, run, gpus, network), step_time(work, run, gpus, network)
            assert least <= time.seconds
            if gpus == 1:  # which waits for none and exchanges nothing
                assert least == pytest.approx(time.seconds, rel=1e-6)


@pytest.mark.parametrize("name", SPREAD)
def test_memory_is_that_of_the_plans_which_real_runs_are_held_to(name: str) -> None:
    """test_memory_of_a_step.py counts what ranks allocate in each of these, within 10 % of plans."""
    model, parallel = SPREAD[name]
    stages, number = parallel.pipeline_model_parallel_layout, RANKS.get(name, 2)
    config = replace(run_of("model=tiny_hybrid", "cluster=a800"), model=model)
    stage = replace(config.stage, seq_length=512 - model.num_sink_tokens, global_batch_size=2)
    layout = Layout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        None if stages is None else tuple(stages),
        parallel.sequence_parallel,
        parallel.use_distributed_optimizer,
        parallel.recompute,
        1,
        parallel.virtual_stages,
    )
    config = replace(config, stage=stage)
    searched = plan_run(layout.run(config, number), number)
    measured = plan_run(replace(config, parallel=parallel), number)
    assert [each.memory for each in searched.stages] == [each.memory for each in measured.stages]


@pytest.fixture(scope="module")
def large() -> Search:
    return search(run_of("experiment=spikingbrain_76b_8k", "cluster=c550"), 512, 3, EFFICIENCY)


def test_the_76b_on_512_gpus(large: Search) -> None:
    """The published layout (DP 128 x EP 8 x PP 4) works, too, and is not faster than what is listed."""
    assert len(large.found) == 3 and large.tried > 1000
    config = run_of("experiment=spikingbrain_76b_8k", "cluster=c550")
    published = step_time(ModelWork(config), config, 512, Network.of(config.cluster))
    assert large.found[0].time.seconds <= published.seconds
    for each in large.found:
        assert large.device.fit(each.plan.fullest.memory.total) is Fit.fits
        assert each.plan.world_size == 512 and len({found.layout.degrees for found in large.found}) == 3
    assert any("too much" in sentence for sentence in large.rejections.example.values())


SEVEN_B = ("--model", "spikingbrain_7b", "--seq-length", "8192", "--global-batch-size", "512")
TINY = ("--model", "tiny_hybrid", "--seq-length", "4096", "model.max_position_embeddings=4096")


@pytest.mark.parametrize("choose", [1, 3])
def test_a_written_layout_is_accepted_and_planned_as_it_was_found(
    choose: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my_conf" / "parallel" / "found.yaml"
    words = [*SEVEN_B, "--cluster", "c550", "--gpus", "32", "--choose", str(choose), "--output", str(output)]
    plan_parallel(words)
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if "spikingbrain-train" in line).partition(": ")[2]
    program, *arguments = shlex.split(command)
    assert program == "spikingbrain-train" and arguments[-1] == "dry_run=true"
    config = to_run_config(compose_run(arguments))
    check_run_config(config, 32)
    plan_parallel([*words[:-2], "--json"])
    listed = json.loads(capsys.readouterr().out)[0]["layouts"]
    chosen = listed[choose - 1]
    plan = plan_run(config, 32)
    assert plan.fullest.memory.total == chosen["bytes"]
    assert plan.data_parallel_size == chosen["data"]
    assert [len(stage.layers) for stage in plan.stages] == chosen["layers_of_stages"]
    assert f"{chosen['mfu']:.1%}" in output.read_text()


def test_scaling_is_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "scaling.png"
    batches = ("--global-batch-size", "8", "16", "32")
    plan_parallel([*TINY, "--cluster", "h100", "--gpus", "1", "2", "8", *batches, "--plot", str(picture)])
    said = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    assert [(row[0], row[1]) for row in rows] == [("1", "8"), ("2", "16"), ("8", "32")]
    plan_parallel([*TINY, "--cluster", "h100", "--gpus", "2", "--plot", str(tmp_path / "bars.svg")])
    assert "recomputation" in (tmp_path / "bars.svg").read_text()


def test_a_checkpoint_folder_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spikingbrain_train.config.load import save_config
    from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE

    folder = tmp_path / "iter_0000000"
    folder.mkdir()
    (folder / ".metadata").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("0")
    save_config(run_of("model=tiny_hybrid", "cluster=h100").model, folder / MODEL_CONFIG_FILE)
    words = ["--cluster", "h100", "--gpus", "2", "--global-batch-size", "4", "--seq-length", "256"]
    plan_parallel(["--model", str(tmp_path), *words, "--json"])
    from_folder = json.loads(capsys.readouterr().out)
    plan_parallel(["--model", "tiny_hybrid", *words, "--json"])
    assert from_folder == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--cluster", "b200", "--gpus", "8"],
            "--cluster b200 is no choice of conf/cluster; did you mean h200?",
        ),
        (["--model", "outputs/hybird", "--gpus", "8"], "or the folder of a checkpoint"),
        (["--cluster", "b200", "--gpus", "8", "hydra.searchpath=[]"], "cluster=b200 does not exist; did you"),
        (["--cluster", "nvidia", "--gpus", "8"], "cluster.peak_tflops is null"),
        (
            ["--cluster", "h100", "--gpus", "12"],
            "no whole number of nodes of cluster.gpus_per_node=8; give 8 or",
        ),
        (["--cluster", "h100", "--gpus", "0"], "--gpus is 0; give at least 1"),
        (["--cluster", "h100", "--gpus", "7", "stage.global_batch_size=8"], "no layout works on --gpus 7: "),
        (
            ["--cluster", "h100", "--gpus", "8", "--output", "x.yaml"],
            "name it so, e.g. --output my_conf/parallel/",
        ),
        (["--cluster", "h100", "--gpus", "8", "parallel.recompute=full"], "is what is searched; leave "),
        (["--cluster", "h100", "--gpus", "8", "stage=distill"], "stage.kind=distill with a teacher"),
        (["--cluster", "h100", "--gpus", "8", "--efficiency", "2"], "--efficiency is 2; give a share"),
        (
            ["--cluster", "h100", "--gpus", "8", "16", "--output", "a/parallel/b.yaml"],
            "name one number of --gpus",
        ),
        (
            ["--cluster", "h100", "--gpus", "8", "cluster.intra_node_gb_per_s=null"],
            "intra_node_gb_per_s is null",
        ),
        (
            ["--cluster", "h100", "--gpus", "1", "cluster.memory_gib=0.02"],
            "needs 0.0 GiB a GPU and so one of",
        ),
        (
            ["--cluster", "h100", "--gpus", "8", "--engines", "fsdp", "optimizer=muon_cosine"],
            "no layout works on --gpus 8: 12 x e.g. parallel.engine=fsdp cuts parameters into parts",
        ),
        (
            ["--cluster", "h100", "--gpus", "8", "--engines", "deepspeed", "checkpoint.memory_interval=5"],
            "e.g. parallel.engine=deepspeed keeps no checkpoints in the memory",
        ),
        (
            ["--cluster", "h100", "--gpus", "1", "--engines", "fsdp"],
            "no layout works on --gpus 1: DeepSpeed and FSDP shard over several GPUs",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        plan_parallel([*TINY, *words])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.splitlines()[-1].startswith("error: ") and sentence in said


def test_layouts_that_fit_and_are_refused_are_no_question_of_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigurationError("a.setting=1 is refused")

    monkeypatch.setattr("spikingbrain_train.planning.layouts.search.check_run_config", refuse)
    with pytest.raises(SystemExit):
        plan_parallel([*TINY, "--cluster", "h100", "--gpus", "8"])
    said = capsys.readouterr().err
    assert "no layout works on --gpus 8" in said and "e.g. a.setting=1 is refused" in said


def test_a_model_that_fits_nowhere_says_what_would_be_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_parallel([*SEVEN_B, "--cluster", "c550", "--gpus", "1"])
    said = capsys.readouterr().err
    assert "fits into 64.0 GiB on --gpus 1" in said and "on which one fits" in said
