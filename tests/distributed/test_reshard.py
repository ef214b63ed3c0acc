"""A checkpoint laid out for other ranks holds the same numbers, in the chunks that they would write."""

from __future__ import annotations

import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.conversion.lineage import lineage
from spikingbrain_train.conversion.reshard import reshard_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.runtime.checkpoint_metadata import COMMON_STATE_FILE, read_metadata
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from spikingbrain_train.storage.checkpoint_manifest import MANIFEST_FILE
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, run_config, train

OLD = Path(__file__).parents[1] / "old_checkpoints" / "76b"
ONE = ParallelConfig()
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
TP2_PP2_EXPERTS = replace(TP2_PP2, sequence_parallel=True, expert_tensor_parallel_size=1)
TP2_EP2 = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
EP2 = ParallelConfig(expert_model_parallel_size=2)


def chunks(checkpoint: Path) -> dict[str, set]:
    """Where the chunks of each tensor of weights and optimizer begin and end."""
    return {
        name: {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks}
        for name, entry in read_metadata(checkpoint).state_dict_metadata.items()
        if hasattr(entry, "chunks") and not name.startswith("generators.")
    }


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = MegatronCheckpointReader(checkpoint)
    return {name: reader.read(name) for name in reader.tensors}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def reshard(checkpoint: Path, output: Path, parallel: ParallelConfig) -> Path:
    reshard_checkpoint(checkpoint, output, parallel)
    return latest_checkpoint(output, "output")


@pytest.mark.parametrize(
    "road", [(TP2, PP2, EP2, ONE), (TP2_PP2_EXPERTS, TP2_EP2, ONE)], ids=["one by one", "several at once"]
)
def test_the_way_there_and_back_changes_no_bit(
    road: tuple[ParallelConfig, ...], tmp_path: Path, hybrid_76b_checkpoint: Path
) -> None:
    source = latest_checkpoint(hybrid_76b_checkpoint, "checkpoint")
    first = here = reshard(source, tmp_path / "first", ONE)
    for number, parallel in enumerate(road):
        here = reshard(here, tmp_path / str(number), parallel)
    before, after = tensors(source), tensors(here)
    assert before.keys() == after.keys() and any(name.startswith("optimizer.") for name in before)
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype and tensor.shape == after[name].shape, name
        assert torch.equal(bits(tensor), bits(after[name])), name
    assert filecmp.cmp(source / COMMON_STATE_FILE, here / COMMON_STATE_FILE, shallow=False)
    files = sorted(path.name for path in first.iterdir() if path.is_file())
    assert files == sorted(path.name for path in here.iterdir() if path.is_file())
    differ = filecmp.cmpfiles(first, here, files, shallow=False)[1:]
    assert differ == (["derivation.json", MANIFEST_FILE], [])  # which tell the way, and the checksum of that
    entries = [json.loads((folder / MANIFEST_FILE).read_text()) for folder in (first, here)]
    for entry in entries:
        del entry["beside"]["derivation.json"]
    assert entries[0] == entries[1]


def test_a_run_goes_on_from_it_as_from_the_original(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    """The same losses at the new topology, whose next checkpoint has the chunks of the resharded one."""
    report = reshard_checkpoint(hybrid_checkpoint, tmp_path / "resharded" / "checkpoints", TP2_PP2)
    assert report.read_before > 1.5 * report.read_after  # a rank reads chunks whole, of which it needs a half
    resharded = latest_checkpoint(tmp_path / "resharded" / "checkpoints", "output")
    shutil.copytree(hybrid_checkpoint, tmp_path / "original" / "checkpoints")
    found = []
    for name in ("original", "resharded"):
        config = run_config(tmp_path / name, text, model=MODEL, parallel=TP2_PP2)
        config.stage = replace(config.stage, train_iters=2, global_batch_size=1)
        config.optimizer.lr_warmup_iters = 0
        found.append(ranks.run(train, config, world_size=4, parallel=TP2_PP2))
    assert found[0] == found[1] and len(found[0][0]) == 1
    written = latest_checkpoint(tmp_path / "original" / "checkpoints", "output")
    assert written.name == "iter_0000002" and chunks(written) == chunks(resharded)


def test_experts_and_sinks_lie_as_ranks_write_them(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path
) -> None:
    config = run_config(tmp_path / "run", text, model=MODEL_76B, parallel=TP2_EP2)
    config.stage = replace(config.stage, train_iters=1, global_batch_size=2)
    config.optimizer.lr_warmup_iters = 0
    ranks.run(train, config, world_size=4, parallel=TP2_EP2)
    written = latest_checkpoint(tmp_path / "run" / "checkpoints", "output")
    resharded = reshard(hybrid_76b_checkpoint, tmp_path / "resharded", TP2_EP2)
    assert chunks(written) == chunks(resharded)


def test_it_says_where_it_comes_from_and_what_it_saves(tmp_path: Path) -> None:
    report = reshard_checkpoint(OLD, tmp_path / "out", PP2)
    assert report.layout == "TP 1 x PP 2 x EP 1" and report.ranks == report.files == 2
    assert report.read_before == report.read_after  # pipeline stages share no chunk
    here = latest_checkpoint(tmp_path / "out", "out")
    first, second = lineage(here)[:2]
    assert "laid out for TP 1 x PP 2 x EP 1, from " in first.did and second.did.startswith(
        "stage cpt: 2 iter"
    )
    assert history_with(here) == history_with(latest_checkpoint(OLD / "checkpoints", "old"))
    told = inspect_checkpoint(here)
    assert "files:      2 files, " in told.text(width=400) and "MB; laid out for TP 1 x PP 2" in told.files
    listed = told.table("optimizer.*exp_avg.decoder.layers.1.*router*")
    assert "[2, 16]" in listed and "1 of 109 tensors" in listed
    old = inspect_checkpoint(OLD)
    assert old.files.endswith("TP 1 x PP 1 x EP 1, written by 1 rank") and len(old.values()["tensors"]) == 109


def test_weights_alone(tmp_path: Path) -> None:
    report = reshard_checkpoint(OLD, tmp_path / "out", ONE, weights_only=True)
    here = latest_checkpoint(tmp_path / "out", "out")
    assert report.state == 0 and inspect_checkpoint(here).training is None
    assert not (here / "run_config.yaml").exists()
    before = tensors(latest_checkpoint(OLD / "checkpoints", "old"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(here).items())


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = reshard_checkpoint(OLD, tmp_path / "out", PP2, dry_run=True)
    assert "would write" in report.table() and list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not divide model.num_query_groups=1; valid"):
        reshard_checkpoint(OLD, tmp_path / "out", ParallelConfig(tensor_model_parallel_size=2))
    copy = tmp_path / "copy"
    shutil.copytree(OLD / "checkpoints" / "iter_0000002", copy / "iter_0000002")
    shard = copy / "iter_0000002" / "__0_1.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp is damaged or of another save"):
        reshard_checkpoint(copy / "iter_0000002", tmp_path / "out", PP2)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp is missing; copy the checkpoint again"):
        reshard_checkpoint(copy / "iter_0000002", tmp_path / "out", PP2)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
