"""Probes and teachers of Megatron checkpoints: the same numbers in every topology, and in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy
import pytest

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from tests.distributed import small_runs
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp
from tests.distributed.test_checkpoint_evaluation import evaluate

PROBES = ["--probes", "passkey,associative_recall", "--probe-lengths", "500", "--probe-samples", "1"]
PROBES += ["--probe-depths", "0,100"]
TOPOLOGIES = {
    "TP 2": ["tp2"],
    "PP 2": ["pp2"],
    "CP 2": ["context_parallel_size=2"],
    "DP 2": [],
}


TEACHER = ["--teacher-prompts", "4", "--teacher-prompt-tokens", "16", "--teacher-new-tokens", "6"]
WINDOWS = ["--seq-length", "32", "--max-windows", "2"]


@pytest.fixture(scope="module")
def held_out(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a text in the tokens of the checkpoint's source."""
    folder = tmp_path_factory.mktemp("held_out")
    tokenizer = load_tokenizer(text_checkpoint.parent / "source")
    (folder / "staging").mkdir()
    writer = IndexedDatasetWriter(folder / "text", tokenizer, folder / "staging")
    tokens = numpy.asarray(tokenizer.encode(topics["lambda"] + topics["while"]), dtype=writer.dtype)
    writer.add_document(tokens, text_bytes=len(tokens))
    writer.finish()
    writer.publish()
    return str(folder / "text")


def _measure(ranks: RankPool, model: Path, folder: Path, *more: str, world_size: int = 1) -> dict[str, Any]:
    result = folder / "result.json"
    words = ["--model", str(model), *more, "--output", str(result)]
    ranks.run(evaluate, *words, world_size=world_size)
    found = json.loads(result.read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_every_topology_finds_what_one_rank_finds(
    ranks: RankPool, text_checkpoint: Path, tmp_path: Path
) -> None:
    """To 1e-5 nats, by which sums round at other places."""
    picture = tmp_path / "probes.png"
    one = _measure(ranks, text_checkpoint, tmp_path, *PROBES, "--plot", str(picture))
    assert picture.stat().st_size > 0
    assert "cross_entropy" not in one and one["dtype"] == "float32"
    passkey = one["probes"]["results"]["passkey"]["500"]
    assert passkey["answers"] == 2 and passkey["nats_per_token"] > 1
    for name, settings in TOPOLOGIES.items():
        several = _measure(ranks, text_checkpoint, tmp_path, *PROBES, "--parallel", *settings, world_size=2)
        for probe, lengths in one["probes"]["results"].items():
            for length, cell in lengths.items():
                found = several["probes"]["results"][probe][length]
                assert found["nats_per_token"] == pytest.approx(cell["nats_per_token"], abs=1e-5), name
                assert found["accuracy"] == cell["accuracy"] and found["answers"] == cell["answers"], name


def test_a_checkpoint_is_held_against_a_folder_on_one_rank_and_on_several(
    ranks: RankPool, text_checkpoint: Path, held_out: str, tmp_path: Path
) -> None:
    """Its dense source, which the main process alone reads; one rank to 1e-5 nats."""
    source = text_checkpoint.parent / "source"
    words = ["--data", held_out, *WINDOWS, "--teacher", str(source), *TEACHER]
    one = _measure(ranks, text_checkpoint, tmp_path, *words)
    assert one["cross_entropy"] > 0 and one["against_teacher"]["teacher"] == str(source)
    compared = one["against_teacher"]
    assert compared["kl_divergence"] > 0.01 and compared["prompts"] == 4
    for settings in (["tp2"], ["context_parallel_size=2"]):
        several = _measure(ranks, text_checkpoint, tmp_path, *words, "--parallel", *settings, world_size=2)
        found = several["against_teacher"]
        assert found["kl_divergence"] == pytest.approx(compared["kl_divergence"], abs=1e-5)
        assert found["by_position"]["agreement"] == compared["by_position"]["agreement"]
        assert found["repetition"] == compared["repetition"]


def test_a_checkpoint_agrees_with_itself_and_a_folder_with_a_checkpoint_of_its_weights(
    ranks: RankPool, text_checkpoint: Path, held_out: str, tmp_path: Path
) -> None:
    words = ["--data", held_out, *WINDOWS, *TEACHER]
    itself = _measure(
        ranks, text_checkpoint, tmp_path, *words, "--teacher", str(text_checkpoint), "--parallel", "tp2",
        world_size=2,
    )["against_teacher"]  # fmt: skip
    assert itself["agreement"] == itself["forced_agreement"] == itself["identical"] == 1.0
    assert itself["kl_divergence"] == pytest.approx(0.0, abs=1e-6)

    source = text_checkpoint.parent / "source"
    import_checkpoint(source, tmp_path / "dense", ConversionConfig(mixers=["full"] * 4))
    same = _measure(ranks, source, tmp_path, *words, "--teacher", str(tmp_path / "dense"))["against_teacher"]
    assert same["agreement"] == 1.0 and same["kl_divergence"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_a_teacher_without_experts_reads_on_the_ranks_of_its_students_experts(
    ranks: RankPool, text_checkpoint: Path, text_checkpoint_76b: Path, held_out: str, tmp_path: Path
) -> None:
    words = ["--data", held_out, *WINDOWS, *TEACHER, "--teacher", str(text_checkpoint)]
    one = _measure(ranks, text_checkpoint_76b, tmp_path, *words)["against_teacher"]
    found = _measure(ranks, text_checkpoint_76b, tmp_path, *words, "--parallel", "ep2", world_size=2)
    assert found["against_teacher"]["kl_divergence"] == pytest.approx(one["kl_divergence"], abs=1e-5)
    assert found["against_teacher"]["agreement"] == one["agreement"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        case(each, engine=each.engine, name=name)
        for name, each in {"TP 2": ParallelConfig(tensor_model_parallel_size=2), "FSDP": fsdp()}.items()
    ],
)
def test_a_run_reports_them_between_its_steps_and_takes_the_steps_of_one_without(
    parallel: ParallelConfig, ranks: RankPool, text_checkpoint: Path, held_out: str, tmp_path: Path
) -> None:
    """With two teachers that are the same model; texts are written token by token."""
    probes, teacher = "spikingbrain_train.evaluation.probes", "spikingbrain_train.evaluation.against_teacher"
    source = text_checkpoint.parent / "source"
    import_checkpoint(source, tmp_path / "dense", ConversionConfig(mixers=["full"] * 4))
    of_probes = {"probes": "passkey,associative_recall", "lengths": "500", "depths": "50", "samples": 1}
    small = {"prompts": 2, "prompt_tokens": 8, "new_tokens": 3}
    found = {}
    for name in ("plain", "folder", "checkpoint"):
        config = small_runs.run_config(tmp_path / name, Path(held_out), parallel=parallel)
        config.model = read_stored_model(resolve_checkpoint(text_checkpoint))
        config.data.valid, config.data.tokenizer = [held_out], str(source)
        config.stage = replace(config.stage, train_iters=1, global_batch_size=2)
        config.optimizer.lr_warmup_iters = 0
        if name != "plain":
            config.logging.evaluators = [
                {"path": f"{probes}.evaluator.LongContextProbes", "settings": of_probes},
                {
                    "path": f"{teacher}.evaluator.AgainstTeacher",
                    "settings": {"teacher": str(source if name == "folder" else tmp_path / "dense"), **small},
                },
            ]
        ranks.run(small_runs.train, config, world_size=2, parallel=parallel)
        found[name] = read_metrics(tmp_path / name)
    losses = {
        name: [point["valid/cross_entropy"] for point in points if "valid/cross_entropy" in point]
        for name, points in found.items()
    }
    assert losses["folder"] == losses["checkpoint"] == losses["plain"] and len(losses["plain"]) == 2
    points = [point for point in found["folder"] if "valid/cross_entropy" in point]
    names = {name for name in points[0] if name.startswith(("probes/", "against_teacher/"))}
    assert names >= {"probes/passkey/500", "probes/associative_recall/500", "against_teacher/agreement"}
    assert points[0]["against_teacher/kl_divergence"] > 0.01
    again = [point for point in found["checkpoint"] if "valid/cross_entropy" in point]
    for name in names:
        assert [p[name] for p in again] == pytest.approx([p[name] for p in points], abs=1e-5), name
