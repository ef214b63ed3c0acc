"""A checkpoint that training wrote, optimizer state and all, is inspected and exported."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint
from tests.conversion.hf_models import HFCheckpoint, all_tensors
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed import small_runs
from tests.distributed.pool import RankPool


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Prefix of an indexed dataset of 400 tokens."""
    staging = tmp_path / "staging"
    staging.mkdir()
    writer = IndexedDatasetWriter(tmp_path / "tokens", small_runs.ByteTokenizer(), staging)
    ids = numpy.random.default_rng(0).integers(0, 101, 400).astype(writer.dtype)
    writer.add_document(ids, text_bytes=len(ids))
    writer.finish()
    writer.publish()
    return tmp_path / "tokens"


@pytest.mark.parametrize("sinks", [0, 1], ids=["no sink", "one sink"])
def test_two_ranks_train_and_the_export_agrees_with_their_model(
    ranks: RankPool, hf_checkpoint: HFCheckpoint, tmp_path: Path, tokens: Path, sinks: int
) -> None:
    """Two steps under tensor parallelism with optimizer state in the checkpoint. Bound as in test_logits."""
    source, _ = hf_checkpoint("qwen2", vocab_size=130)
    recipe = ConversionConfig(sliding_window=7, num_sink_tokens=sinks)
    import_checkpoint(source, tmp_path / "megatron", recipe)
    checkpoint = latest_checkpoint(tmp_path / "megatron", "folder")
    (tmp_path / "secret").write_text("a file of this machine")
    (checkpoint / "hf_source/LICENSE").symlink_to(tmp_path / "secret")
    model = load_model_config(checkpoint / MODEL_CONFIG_FILE)
    parallel = ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True)
    config = small_runs.run_config(
        tmp_path / "run",
        tokens,
        model=model,
        parallel=parallel,
        checkpoint=small_runs.checkpoint_config(tmp_path / "megatron"),
    )
    config.stage.train_iters = 2
    config.optimizer.lr_warmup_iters = 0
    ranks.run(small_runs.train, config, world_size=2, parallel=parallel)

    (trained,) = {path.parent for path in (tmp_path / "run").rglob("latest_checkpointed_iteration.txt")}
    told = inspect_checkpoint(trained).text(width=400)
    assert "iter_0000002" in told
    assert "optimizer" in told
    export_checkpoint(trained, tmp_path / "hf")
    assert not any(path.is_file() and not path.is_symlink() for path in (tmp_path / "run").rglob("LICENSE"))
    assert not (tmp_path / "hf/LICENSE").exists()
    before, after = all_tensors(source), all_tensors(tmp_path / "hf")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])  # it has learned something

    (logits,) = ranks.run(megatron_logits, trained, world_size=1, parallel=ParallelConfig())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        assert (exported.eval()(TOKENS).logits - logits).abs().max() <= 2e-4
