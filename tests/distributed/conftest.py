"""A tokenized text and the checkpoints that distributed training tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.distributed import small_runs
from tests.distributed.pool import RankPool
from tests.small_source import save_small_source


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the indexed dataset that small runs train on."""
    return small_runs.write_text(tmp_path_factory.mktemp("text"))


def _random_checkpoint(ranks: RankPool, folder: Path, text: Path, model: ModelConfig) -> Path:
    config = small_runs.run_config(folder, text, model=model)
    config.stage = StageConfig(train_iters=1, seq_length=32, global_batch_size=1)
    config.optimizer.lr_warmup_iters = 0
    ranks.run(small_runs.train, config, world_size=1, parallel=ParallelConfig())
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def hybrid_checkpoint(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A hybrid with every mixer, one step away from random weights."""
    return _random_checkpoint(ranks, tmp_path_factory.mktemp("hybrid"), text, small_runs.MODEL)


@pytest.fixture(scope="session")
def hybrid_76b_checkpoint(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The same with two branches a layer, sinks and experts."""
    return _random_checkpoint(ranks, tmp_path_factory.mktemp("hybrid_76b"), text, small_runs.MODEL_76B)


@pytest.fixture(scope="session")
def dense_checkpoint(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Its dense teacher, of other random weights."""
    return _random_checkpoint(ranks, tmp_path_factory.mktemp("dense"), text, small_runs.DENSE)


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid of three mixers with a tokenizer, as imported."""
    folder = tmp_path_factory.mktemp("text_hybrid")
    recipe = ConversionConfig(mixers=["gla", "swa", "gla", "full"], sliding_window=7)
    import_checkpoint(save_small_source(folder / "source"), folder / "checkpoint", recipe)
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def text_checkpoint_76b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches, sinks, and experts with room for half of their tokens."""
    folder = tmp_path_factory.mktemp("text_hybrid_76b")
    recipe = ConversionConfig(
        mixers=[["gla", "swa"], ["gla", "full"]],
        sliding_window=7,
        num_sink_tokens=4,
        feed_forwards=["dense", "moe"],
        moe=MoEConfig(num_experts=4, router_topk=1, num_shared_experts=1, capacity_factor=0.5),
    )
    import_checkpoint(save_small_source(folder / "source"), folder / "checkpoint", recipe)
    return folder / "checkpoint"
