"""A Megatron checkpoint is measured as the run that wrote it measures itself, and as its export is.

All in float32. On one rank the number is the run's own, to the last digit: it is the same code. On several
1e-6 relative, the tolerance of other tests of topologies' losses; against transformers 1e-6, too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.stage import SpikeAnnealingConfig, SubNormAnnealingConfig
from spikingbrain_train.reporting.metrics import read_events, read_metrics
from tests.distributed import small_runs
from tests.distributed.pool import RankPool

TOPOLOGIES: dict[str, tuple[int, list[str]]] = {
    "TP 2": (2, ["tp2"]),
    "TP 2 + sequence parallel": (2, ["tp2_sp"]),
    "PP 2": (2, ["parallel=pp2"]),
    "DP 2": (2, []),
    "EP 2": (2, ["ep2"]),
    "CP 2": (2, ["parallel.context_parallel_size=2"]),
    "TP 2 x PP 2": (4, ["tp2_pp2"]),
}
EXPERTS = ("TP 2 + sequence parallel", "PP 2", "EP 2", "CP 2")


def evaluate(*arguments: str) -> None:
    """spikingbrain-evaluate, on every rank of a pool."""
    from spikingbrain_train.evaluation.command_line import evaluate

    evaluate([*arguments, "--device", "cpu", "--dtype", "float32"])


def measure(ranks: RankPool, folder: Path, *arguments: Any, world_size: int = 1) -> dict[str, Any]:
    """What the command writes."""
    result = folder / "result.json"
    words = [*map(str, arguments), "--output", str(result)]
    ranks.run(evaluate, *words, world_size=world_size)
    found = json.loads(result.read_text())
    assert isinstance(found, dict)
    return found


def train(ranks: RankPool, folder: Path, text: Path, model: ModelConfig, **changes: Any) -> dict[str, float]:
    """Train two steps, and return the last point of held-out metrics."""
    config = small_runs.run_config(folder, text, model=model)
    config.stage = replace(config.stage, train_iters=2, global_batch_size=1)
    config.optimizer.lr_warmup_iters = 0
    config.data.valid = [str(text)]
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        setattr(getattr(config, section), setting, value)
    ranks.run(small_runs.train, config, world_size=1, parallel=ParallelConfig())
    return next(point for point in reversed(read_metrics(folder)) if "valid/cross_entropy" in point)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["7B", "76B"])
def test_the_number_is_that_of_the_runs_own_evaluation(
    form: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Of two datasets, the first windows of them, with the documents of a window kept apart as in the run."""
    short = small_runs.write_text(tmp_path, lines=7)
    model = small_runs.MODEL if form == "7B" else small_runs.MODEL_76B
    run = tmp_path / "run"
    logged = train(
        ranks,
        run,
        text,
        model,
        data__reset_at_documents=True,
        data__valid=[str(short), str(text)],
        logging__eval_iters=20,
    )
    arguments = ("--data", short, text, "--seq-length", 32, "--max-windows", 20)
    for folder in (run, run / "checkpoints", run / "checkpoints" / "iter_0000002"):
        found = measure(ranks, tmp_path, "--model", folder, *arguments)
        assert found["cross_entropy"] == logged["valid/cross_entropy"]
    (event,) = read_events(run)
    assert found["windows"] == 20 and len(found["held_out"]) == 2
    for name, dataset in found["held_out"].items():
        assert dataset.pop("cross_entropy") == logged[f"valid/cross_entropy/{name}"]
    assert found["held_out"] == event["run"]["held_out"]
    assert (found["dtype"], found["reset_at_documents"]) == ("float32", True)
    mixed = measure(ranks, tmp_path, "--model", run, *arguments, "--reset-at-documents", "false")
    assert mixed["cross_entropy"] != found["cross_entropy"]


def test_spikes_on_their_way_are_as_coarse_as_in_the_run(ranks: RankPool, tmp_path: Path, text: Path) -> None:
    spikes = SpikingConfig(projections=list(Projection), k=2.0)
    logged = train(
        ranks,
        tmp_path / "run",
        text,
        replace(small_runs.MODEL, spiking=spikes),
        stage__spike_annealing=SpikeAnnealingConfig(init_k=16.0, anneal_iters=2),
        checkpoint__save_interval=1,
        logging__eval_interval=1,
        logging__eval_iters=4,
    )
    points = [p for p in read_metrics(tmp_path / "run") if "valid/cross_entropy" in p]
    assert points[-1] == logged and points[-2]["spiking/k"] > points[-1]["spiking/k"] == 2.0
    for iteration in (1, 2):
        folder = tmp_path / f"run/checkpoints/iter_{iteration:07d}"
        arguments = ("--model", folder, "--data", text, "--seq-length", 32, "--max-windows", 4)
        found = measure(ranks, tmp_path, *arguments)
        assert found["cross_entropy"] == points[iteration]["valid/cross_entropy"]


def test_norms_on_their_way_have_come_in_as_far_as_in_the_run(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    train(
        ranks,
        tmp_path / "run",
        text,
        replace(small_runs.MODEL, attn_sub_norm=True, ffn_sub_norm=True),
        stage__sub_norm_annealing=SubNormAnnealingConfig(anneal_iters=2),
        checkpoint__save_interval=1,
        logging__eval_interval=1,
        logging__eval_iters=4,
    )
    points = [p for p in read_metrics(tmp_path / "run") if "valid/cross_entropy" in p]
    assert [point["sub_norms/share"] for point in points] == [0.0, 0.5, 1.0]
    for iteration in (1, 2):
        folder = tmp_path / f"run/checkpoints/iter_{iteration:07d}"
        arguments = ("--model", folder, "--data", text, "--seq-length", 32, "--max-windows", 4)
        found = measure(ranks, tmp_path, *arguments)
        assert found["cross_entropy"] == points[iteration]["valid/cross_entropy"]


def _windows(checkpoint: Path, text: Path) -> tuple[Any, ...]:
    # 28 and the sinks of the 76B form divide over slices and tensor-parallel ranks, as do 28 without.
    return "--model", checkpoint, "--data", text, "--seq-length", 28, "--max-windows", 9


@pytest.fixture(scope="module")
def of_one_rank(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
) -> dict[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one_rank")
    checkpoints = (hybrid_checkpoint, hybrid_76b_checkpoint)
    return {checkpoint: measure(ranks, folder, *_windows(checkpoint, text)) for checkpoint in checkpoints}


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_gives_the_number_of_one_rank(
    topology: str,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
    of_one_rank: dict[Path, dict[str, Any]],
) -> None:
    size, settings = TOPOLOGIES[topology]
    checkpoints = [hybrid_checkpoint] if topology != "EP 2" else []
    checkpoints += [hybrid_76b_checkpoint] if topology in EXPERTS else []
    for checkpoint in checkpoints:
        arguments, one = _windows(checkpoint, text), of_one_rank[checkpoint]
        parallel = ["--parallel", *settings] if settings else []
        several = measure(ranks, tmp_path, *arguments, *parallel, world_size=size)
        assert several["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=1e-6)
        assert several["held_out"].keys() == one["held_out"].keys() and several["tokens"] == one["tokens"]


@pytest.mark.parametrize("form", ["hybrid", "dense"])
def test_the_number_is_that_of_the_exported_folder(
    form: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, dense_checkpoint: Path
) -> None:
    import torch

    from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
    from spikingbrain_train.data.gpt_dataset import open_valid_dataset
    from spikingbrain_train.evaluation.perplexity import measure_perplexity
    from spikingbrain_train.evaluation.pretrained import load_causal_lm

    checkpoint = hybrid_checkpoint if form == "hybrid" else dense_checkpoint
    found = measure(
        ranks, tmp_path, "--model", checkpoint, "--data", text, "--seq-length", 64, "--max-windows", 20
    )
    export_checkpoint(checkpoint, tmp_path / "export")
    model = load_causal_lm(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu")
    )
    exported = measure_perplexity(model, open_valid_dataset([str(text)], 64, 20))
    assert found["cross_entropy"] == pytest.approx(exported.cross_entropy, rel=1e-6)
    assert (found["tokens"], found["windows"]) == (exported.tokens, exported.windows)
