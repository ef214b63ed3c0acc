"""A run from a cache of its teacher's logits is held to what the cache is of, before torch is imported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import DistillationConfig, StageConfig
from spikingbrain_train.errors import DataError, SpikingBrainError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.teacher_cache_request import missing_shards, open_cache, request_cache
from spikingbrain_train.storage.teacher_cache import CACHE_FILE, shard_path
from tests.config.small_dataset import write_dataset
from tests.config.small_model import small_model, write_checkpoint

DTYPES = {"U16": np.uint16, "I32": np.int32, "F16": np.float16, "F32": np.float32}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run of 12 samples, its teacher, and its cache in files of 5."""
    teacher = write_checkpoint(tmp_path / "dense", small_model(mixers=["full"]))
    config = RunConfig(
        model=small_model(),
        stage=StageConfig(kind="distill", train_iters=6, seq_length=16, global_batch_size=2, teacher=teacher),
        data=dataclasses.replace(RunConfig().data, train=[write_dataset(tmp_path / "a", documents=5)]),
        output_dir=str(tmp_path / "run"),
    )
    folder = tmp_path / "cache"
    request = request_cache(config, folder, top=3, drawn=2, world_size=1)
    request = dataclasses.replace(request, layout=dataclasses.replace(request.layout, shard_samples=5))
    folder.mkdir()
    open_cache(request)
    for samples in request.layout.shards(12):
        tensors = request.layout.tensors(len(samples)).items()
        zeros = {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors}
        save_file(zeros, shard_path(folder, samples))
    config.stage.teacher = None
    config.stage.distillation = DistillationConfig(cache=str(folder))
    return config


def refusal(config: RunConfig) -> str:
    with pytest.raises(SpikingBrainError) as error:
        check_run_config(config, 1)
    sentence = str(error.value)
    assert "\n" not in sentence and "cache" in sentence
    return sentence


def test_it_needs_no_teacher_and_plans_none(run: RunConfig) -> None:
    assert check_run_config(run, 1) is None
    plan = plan_run(run, 1)
    online = dataclasses.replace(run.stage, distillation=DistillationConfig(), teacher="dense")
    with_teacher = plan_run(dataclasses.replace(run, stage=online), 1)
    assert plan.stages[0].memory.teacher == 0 < with_teacher.stages[0].memory.teacher
    assert plan.flops_per_token < with_teacher.flops_per_token


def _change(config: RunConfig, name: str, value: Any) -> None:
    target: Any = config
    *path, last = name.split(".")
    for part in path:
        target = getattr(target, part)
    setattr(target, last, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 7),
        ("stage.seq_length", 8),
        ("data.reset_at_documents", True),
        ("stage.distillation.temperature", 2.0),
    ],
)
def test_another_order_or_distribution_is_refused_by_name(run: RunConfig, name: str, value: Any) -> None:
    _change(run, name, value)
    assert f"was written with {name}=" in refusal(run)


def test_other_tokens_tokenizers_and_shares_are_refused(run: RunConfig, tmp_path: Path) -> None:
    (one,) = run.data.train
    Path(f"{one}.json").write_text(json.dumps({"tokenizer_fingerprint": "another"}))
    assert "tokenizer of data.train=[null]" in refusal(run)
    Path(f"{one}.json").unlink()
    run.data.train = [write_dataset(tmp_path / "b", documents=5, reverse=True)]
    assert "was written with data.train=[100 tokens in 5 documents" in refusal(run)
    run.data.train = [one, f"{run.data.train[0]}"]
    assert "data.train=" in refusal(run)


def test_another_teacher_is_refused_where_one_is_named(run: RunConfig, tmp_path: Path) -> None:
    run.stage.teacher = write_checkpoint(tmp_path / "other", small_model(mixers=["full"]))
    (tmp_path / "other" / "iter_0000000" / "weights.distcp").write_bytes(b"other weights")
    assert "weights of stage.teacher=" in refusal(run)


def test_missing_samples_and_damaged_files_are_named(run: RunConfig) -> None:
    folder = Path(str(run.stage.distillation.cache))
    run.stage.train_iters = 8
    assert "lacks samples 12 to 15 of the 16 that this run reads" in refusal(run)
    run.stage.train_iters = 6
    second = shard_path(folder, range(5, 10))
    content = second.read_bytes()
    second.unlink()
    assert "lacks samples 5 to 9 of the 12" in refusal(run)
    second.write_bytes(content[:-1])
    assert f"{second} is damaged" in refusal(run)
    second.write_bytes(content)
    check_run_config(run, 1)
    (folder / CACHE_FILE).unlink()
    assert f"has no {CACHE_FILE}" in refusal(run)


def test_a_cache_is_gone_on_with_as_it_began(run: RunConfig, tmp_path: Path) -> None:
    folder = Path(str(run.stage.distillation.cache))
    run.stage.distillation.cache, run.stage.teacher = None, str(tmp_path / "dense")
    request = request_cache(run, folder, top=3, drawn=2, world_size=1)
    assert request.layout.shard_samples == 5
    assert dict(request.describe(1))["left"].startswith("0 files")
    second = shard_path(folder, range(5, 10))
    second.write_bytes(second.read_bytes()[:-1])  # cut short: written anew
    assert missing_shards(request) == [range(5, 10)]
    with pytest.raises(DataError, match="keeps 3 tokens and 2 drawn ones, not 4 and 2"):
        request_cache(run, folder, top=4, drawn=2, world_size=1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stage.kind", "cpt", "stage.kind=cpt reads no cache"),
        ("stage.teacher", None, "stage.teacher is null"),
        ("parallel.context_parallel_size", 2, "parallel.context_parallel_size=2 splits sequences"),
        ("stage.seq_length", 4096, "stage.seq_length=4096 is longer than the 1024 positions"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    run: RunConfig, tmp_path: Path, name: str, value: Any, words: str
) -> None:
    run.stage.distillation.cache, run.stage.teacher = None, str(tmp_path / "dense")
    _change(run, name, value)
    with pytest.raises(SpikingBrainError, match=words):
        request_cache(run, tmp_path / "new", top=3, drawn=2, world_size=2)
