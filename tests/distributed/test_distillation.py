"""Distillation from a teacher, and from a cache of its logits: on one rank, and the same on any topology.

Tolerance 1e-5 relative over four fp32 steps, as in test_training_topologies.py. A cache keeps some tokens of
each distribution; what it loses is held to 1e-3 nats of the online curve, the bound of the real one
(benchmarks/teacher_cache.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig, SpikingConfig
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import DistillationConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.adapted import assert_only_adapters_changed
from tests.distributed.pool import RankFailure, RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, checkpoint_config, run_config, train

ONE = ParallelConfig()
SPLIT = {
    "TP 2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP 2": ParallelConfig(pipeline_model_parallel_size=2),
    "CP 2": ParallelConfig(context_parallel_size=2),
    "EP 2": ParallelConfig(expert_model_parallel_size=2),
}
STEPS, TOP, DRAWN = 4, 64, 64


def _config(
    folder: Path, text: Path, load: Path, teacher: Path | None, cache: Path | None = None
) -> RunConfig:
    """Pure KL of the model with experts and sinks, which has every mixer, too."""
    config = run_config(folder, text, model=MODEL_76B, checkpoint=checkpoint_config(load))
    config.stage = replace(config.stage, kind="distill", train_iters=STEPS, micro_batch_size=2)
    config.stage.teacher = None if teacher is None else str(teacher)
    config.stage.distillation = DistillationConfig(cache=None if cache is None else str(cache))
    config.optimizer.lr, config.optimizer.lr_warmup_iters = 1e-3, 1
    config.data.reset_at_documents = True
    return config


def _write(groups: ProcessGroups, config: RunConfig, folder: Path, drawn: int = DRAWN) -> list[str]:
    """Write a cache, and say which files were written."""
    from spikingbrain_train.planning.teacher_cache_request import request_cache
    from spikingbrain_train.training.teacher_cache import write_cache_on

    request = request_cache(config, folder, top=TOP, drawn=drawn, world_size=groups.world_size)
    request = replace(request, layout=replace(request.layout, shard_samples=5))  # the last of 16 stands alone
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("samples_*")}
    write_cache_on(groups, request)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("samples_*")}
    return sorted(name for name, time in after.items() if before.get(name) != time)


def _losses(folder: Path) -> list[dict[str, float]]:
    names = ("train/loss", "train/cross_entropy", "train/kl_divergence")
    return [{name: point[name] for name in names} for point in read_metrics(folder)]


@pytest.fixture(scope="module")
def teacher(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A dense model that has learnt something, so that the student is some way off."""
    folder = tmp_path_factory.mktemp("teacher")
    config = run_config(folder, text, model=replace(MODEL, mixers=["full"]))
    ranks.run(train, config, world_size=1, parallel=ONE)
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def cache(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path) -> Path:
    """Written by one rank."""
    folder = tmp_path_factory.mktemp("cache")
    config = _config(folder / "unused", text, teacher, teacher)
    written = ranks.run(_write, config, folder, world_size=1, parallel=ONE)
    assert written == [
        [f"samples_{a:09}_{b:09}.safetensors" for a, b in ((0, 5), (5, 10), (10, 15), (15, 16))]
    ]
    return folder


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    hybrid_76b_checkpoint: Path,
    teacher: Path,
    cache: Path,
) -> dict[str, list[dict[str, float]]]:
    """Losses of every step, online and from the cache."""
    found = {}
    for source, learns in (("online", (teacher, None)), ("cache", (None, cache))):
        folder = tmp_path_factory.mktemp(source)
        config = _config(folder, text, hybrid_76b_checkpoint, *learns)
        ranks.run(train, config, world_size=1, parallel=ONE)
        found[source] = _losses(folder)
    return found


def test_a_cache_gives_the_curve_of_the_online_teacher(one_rank: dict[str, list[dict[str, float]]]) -> None:
    online, cached = one_rank["online"], one_rank["cache"]
    assert len(online) == len(cached) == STEPS
    assert online[0]["train/kl_divergence"] > 0.05
    for theirs, ours in zip(online, cached, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3, rel=0)


@pytest.mark.parametrize("source", ["online", "cache"])
@pytest.mark.parametrize("name", SPLIT)
def test_every_topology_has_the_losses_of_one_rank(
    name: str,
    source: str,
    one_rank: dict[str, list[dict[str, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_76b_checkpoint: Path,
    teacher: Path,
    cache: Path,
) -> None:
    learns = (teacher, None) if source == "online" else (None, cache)
    config = _config(tmp_path, text, hybrid_76b_checkpoint, *learns)
    config.parallel = SPLIT[name]
    ranks.run(train, config, world_size=2, parallel=config.parallel)
    for ours, expected in zip(_losses(tmp_path), one_rank[source], strict=True):
        # A KL divergence is what is left of log probabilities around 5.
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("parallel", [SPLIT["TP 2"], SPLIT["PP 2"], ONE], ids=["TP 2", "PP 2", "DP 2"])
def test_any_ranks_write_the_same_cache_and_only_what_is_missing(
    parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path, teacher: Path, cache: Path
) -> None:
    config = _config(tmp_path / "unused", text, teacher, teacher)
    config.parallel = parallel
    folder = tmp_path / "cache"
    ranks.run(_write, config, folder, world_size=2, parallel=parallel)
    for path in cache.glob("samples_*"):
        ours, theirs = load_file(folder / path.name), load_file(path)
        same = ours["ids"].int() == theirs["ids"].int()
        assert same.float().mean() > 0.99  # tokens of like probability may change places
        torch.testing.assert_close(ours["tail"], theirs["tail"], rtol=1e-4, atol=1e-6)
        near = torch.isclose(
            ours["log_probabilities"].float(), theirs["log_probabilities"].float(), rtol=2e-3
        )
        assert near[same].all()
    if parallel is ONE:
        killed = folder / "samples_000000005_000000010.safetensors"
        killed.unlink()
        (folder / f".{killed.name}.123").write_bytes(b"half of it")
        (written, _) = ranks.run(_write, config, folder, world_size=2, parallel=parallel)
        assert written == [killed.name] and not list(folder.glob(".samples_*"))
        with pytest.raises(RankFailure, match=r"keeps 64 tokens and 64 drawn ones, not 64 and 7"):
            ranks.run(_write, config, folder, 7, world_size=2, parallel=parallel)


def test_adapters_alone_learn_from_a_teacher(
    ranks: RankPool, tmp_path: Path, text: Path, teacher: Path, hybrid_76b_checkpoint: Path
) -> None:
    config = _config(tmp_path, text, hybrid_76b_checkpoint, teacher)
    config.model = replace(config.model, lora=LoraConfig(names=["code"], ranks=[2]))
    config.optimizer.lr = 1e-2
    ranks.run(train, config, world_size=1, parallel=ONE)
    losses = [point["train/kl_divergence"] for point in read_metrics(tmp_path)]
    assert losses[-1] < losses[0]
    assert_only_adapters_changed(hybrid_76b_checkpoint, tmp_path / "checkpoints")


def test_a_float_teacher_teaches_int8_weights_and_spikes(
    ranks: RankPool, tmp_path: Path, text: Path, teacher: Path, hybrid_76b_checkpoint: Path
) -> None:
    config = _config(tmp_path, text, hybrid_76b_checkpoint, teacher)
    projections = [Projection.qkv, Projection.attention_output, Projection.mlp_fc1, Projection.mlp_fc2]
    config.model = replace(
        config.model,
        quantization=QuantizationConfig(projections, group_size=16, keys_and_values=True),
        spiking=SpikingConfig(projections, queries=True),
    )
    config.stage.quantization_annealing.anneal_iters = STEPS
    ranks.run(train, config, world_size=1, parallel=ONE)
    points = read_metrics(tmp_path)
    assert [point["quantization/share"] for point in points] == [0.0, 0.25, 0.5, 0.75]
    losses = [point["train/kl_divergence"] for point in points]
    assert losses[-1] < losses[0]
