"""spikingbrain-bricks grow: the same function at first, in every form of router, and new experts that learn.

Bound: 1e-6 in float32 logits of order 1. What is not chosen is not computed; sums over more experts have
zeros in them, which a softmax may add up in another order.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.bricks.grow import MARGIN, Growth, grow, kept_out
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig, UpcyclingForm
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import ModelConfig, MoEConfig, RouterWeights
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import (
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    iteration_folder,
    latest_checkpoint,
)
from tests.conversion.conftest import hf_checkpoint  # noqa: F401
from tests.conversion.hf_models import HFCheckpoint
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed import small_runs
from tests.distributed.pool import RankPool
from tests.small_source import save_small_source

ROUTERS = {
    "top-2 and a shared expert": MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1),
    "top-1": MoEConfig(num_experts=4, router_topk=1, num_shared_experts=0),
    "add up to 1": MoEConfig(num_experts=4, router_topk=2, norm_topk_prob=True, num_shared_experts=0),
    "count whole": MoEConfig(
        num_experts=4, router_topk=3, router_weights=RouterWeights.ones, num_shared_experts=0
    ),
    "a hidden layer": MoEConfig(num_experts=4, router_topk=2, router_hidden_size=6),
    "a capacity": MoEConfig(num_experts=4, router_topk=2, capacity_factor=1.3),
}
ONE = ParallelConfig()
LAYOUTS = {
    "EP 2": ParallelConfig(expert_model_parallel_size=2),
    "EP 3": ParallelConfig(expert_model_parallel_size=3),
}
EXPERT = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("grow") / "source")


def upcycled(source: Path, folder: Path, moe: MoEConfig) -> Path:
    """Experts that differ, and a router whose logits lie far apart."""
    recipe = ConversionConfig(
        mixers=["gla", "swa"],
        sliding_window=7,
        feed_forwards=["moe", "dense"],
        moe=replace(moe),
        upcycling=UpcyclingConfig(form=UpcyclingForm.published, router_init_std=1.5, reinit_fraction=0.5),
    )
    import_checkpoint(source, folder, recipe)
    return folder


def model_of(folder: Path) -> ModelConfig:
    return load_model_config(latest_checkpoint(folder, "folder") / MODEL_CONFIG_FILE)


def logits_of(ranks: RankPool, folder: Path, parallel: ParallelConfig = ONE) -> torch.Tensor:
    found = ranks.run(
        megatron_logits, folder, world_size=parallel.expert_model_parallel_size, parallel=parallel
    )
    assert found[-1] is not None
    return found[-1]


@pytest.mark.parametrize(
    ("name", "silent"), [*((name, False) for name in ROUTERS), ("top-1", True), ("count whole", True)]
)
def test_more_experts_change_nothing_at_first(
    name: str, silent: bool, ranks: RankPool, source: Path, tmp_path: Path
) -> None:
    before = upcycled(source, tmp_path / "before", ROUTERS[name])
    grown = grow(before, tmp_path / "after", Growth([1, 3], silent=silent))
    assert grown.model.moe.num_experts == 6 and model_of(tmp_path / "after") == grown.model
    expected = logits_of(ranks, before)
    assert 0.1 < expected.abs().max() < 10
    assert (logits_of(ranks, tmp_path / "after") - expected).abs().max() <= 1e-6
    new = MegatronCheckpointReader(latest_checkpoint(tmp_path / "after", "folder")).read(EXPERT)
    assert torch.equal(new[4:], new[[1, 3]]) != silent and bool(new[4:].any()) != silent


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_spread_over_expert_parallel_ranks(
    layout: str, ranks: RankPool, source: Path, tmp_path: Path
) -> None:
    before = upcycled(source, tmp_path / "before", ROUTERS["count whole"])
    grow(before, tmp_path / "once", Growth([0]))
    grow(tmp_path / "once", tmp_path / "twice", Growth([4]))  # of one that is kept out itself
    found = logits_of(ranks, tmp_path / "twice", LAYOUTS[layout])
    assert (found - logits_of(ranks, before)).abs().max() <= 1e-6


def test_an_export_and_its_import_hold_the_biases(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    """Bound of exports (tests/conversion/test_own_format.py): 2e-4."""
    from transformers import AutoModelForCausalLM

    before = upcycled(source, tmp_path / "before", ROUTERS["a hidden layer"])
    grow(before, tmp_path / "after", Growth([1, 3]))
    export_checkpoint(tmp_path / "after", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = model(TOKENS).logits
    assert (found - logits_of(ranks, before)).abs().max() <= 2e-4
    import_checkpoint(tmp_path / "export", tmp_path / "again", None)
    assert torch.equal(logits_of(ranks, tmp_path / "again"), logits_of(ranks, tmp_path / "after"))


def test_imported_experts_grow_and_their_format_refuses_biases(
    ranks: RankPool,
    hf_checkpoint: HFCheckpoint,  # noqa: F811
    tmp_path: Path,
) -> None:
    original, _ = hf_checkpoint("qwen3_moe")
    import_checkpoint(original, tmp_path / "before", ConversionConfig(mixers=["full"]))
    more = [0, 0, 2]
    grow(tmp_path / "before", tmp_path / "after", Growth(more))
    difference = logits_of(ranks, tmp_path / "after") - logits_of(ranks, tmp_path / "before")
    assert difference.abs().max() <= 1e-6
    with pytest.raises(CheckpointError, match="qwen3_moe cannot hold routers with biases"):
        export_checkpoint(tmp_path / "after", tmp_path / "x", format_name="qwen3_moe")


def trained(
    ranks: RankPool, folder: Path, output: Path, text: Path, decay: int, iters: int, size: int = 2
) -> list[tuple[float, float]]:
    model = model_of(folder)
    model = replace(model, moe=replace(model.moe, router_bias_decay_iters=decay))
    config = small_runs.run_config(
        output, text, model=model, checkpoint=small_runs.checkpoint_config(folder, save_interval=2)
    )
    config.stage = replace(config.stage, train_iters=iters)
    config.parallel = ParallelConfig(expert_model_parallel_size=size)
    steps: list[tuple[float, float]] = ranks.run(
        small_runs.train, config, world_size=size, parallel=config.parallel
    )[0]
    return steps


def state(output: Path, iteration: int, name: str) -> torch.Tensor:
    return MegatronCheckpointReader(iteration_folder(output / "checkpoints", iteration)).read(name)


@pytest.mark.slow
def test_new_experts_get_gradients_when_training_has_let_them_in(
    ranks: RankPool, source: Path, tmp_path: Path
) -> None:
    """A first moment of AdamW is zero as long as no token has come by."""
    text = small_runs.write_text(tmp_path)
    before = upcycled(source, tmp_path / "before", ROUTERS["top-2 and a shared expert"])
    grow(before, tmp_path / "grown", Growth([1, 3]))
    moment, bias = f"optimizer.state.exp_avg.{EXPERT}", "decoder.layers.0.mlp.router.bias"

    trained(ranks, tmp_path / "grown", tmp_path / "kept", text, decay=0, iters=4)
    assert not state(tmp_path / "kept", 4, moment)[4:].any() and state(tmp_path / "kept", 4, moment)[:4].any()
    start = MegatronCheckpointReader(latest_checkpoint(tmp_path / "grown", "folder")).read(bias)
    assert torch.equal(state(tmp_path / "kept", 4, bias), start) and start[4:].max() < -MARGIN

    steps = trained(ranks, tmp_path / "grown", tmp_path / "let_in", text, decay=4, iters=6)
    torch.testing.assert_close(state(tmp_path / "let_in", 2, bias), start / 2)
    assert not state(tmp_path / "let_in", 4, bias).any()
    assert all(state(tmp_path / "let_in", 6, moment)[new].any() for new in (4, 5))
    one = trained(ranks, tmp_path / "grown", tmp_path / "one", text, decay=4, iters=6, size=1)
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(one), rtol=1e-5, atol=0)

    checkpoints = tmp_path / "let_in" / "checkpoints"
    for later in (4, 6):
        shutil.rmtree(iteration_folder(checkpoints, later))
    (checkpoints / LATEST_ITERATION_FILE).write_text("2\n")
    assert trained(ranks, tmp_path / "grown", tmp_path / "let_in", text, decay=4, iters=6) == steps[2:]


def test_the_bound_holds_for_whatever_a_norm_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(number, 24, generator=generator) for number in (5, 3))
    gain, bias = 3 * torch.rand(24, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(4000, 24, generator=generator)
    # The worst there is: along the difference of two rows.
    worst = ((new[:, None] - old) * gain).flatten(0, 1)
    n = torch.nn.functional.rms_norm(torch.cat((x, worst)), (24,))
    lowest = (n * gain @ old.T + bias).amin(-1)
    highest = (n * gain @ new.T + kept_out(old, new, bias, gain)).amax(-1)
    assert (lowest - highest).min() >= MARGIN
    assert (lowest - highest).min() <= 1.1 * MARGIN  # and not much lower than it has to be
    inside = torch.tanh(9 * x)
    lowest = (inside @ old.T + bias).amin(-1)
    assert (lowest - (inside @ new.T + kept_out(old, new, bias, None)).amax(-1)).min() >= MARGIN


REFUSED = {
    "none": (("--add", "0"), "--add is 0; add at least 1 expert"),
    "never": (("--add", "1", "--decay-iters", "0"), "which would never let new experts in"),
    "names": (("--add", "2", "--copies-of", "1"), "--copies-of names 1 experts for --add 2"),
    "another": (("--add", "1", "--copies-of", "4"), "--copies-of has 4, but the experts are 0 to 3"),
}


@pytest.fixture(scope="module")
def experts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upcycled(source, tmp_path_factory.mktemp("experts") / "experts", ROUTERS["top-1"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_is_refused_in_one_sentence(
    name: str, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = REFUSED[name]
    with pytest.raises(SystemExit):
        grow_command(experts, tmp_path / "x", *words)
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "x").exists()


def grow_command(checkpoint: Path, output: Path, *words: str) -> None:
    from spikingbrain_train.bricks.command_line import bricks

    bricks(["grow", "--checkpoint", str(checkpoint), "--output", str(output), *words])


def test_the_command_says_which_layouts_take_the_result(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grow_command(experts, tmp_path / "grown", "--add", "2", "--start", "zeros", "--decay-iters", "7")
    assert "expert_model_parallel_size may be 1, 2, 3, 6" in capsys.readouterr().out
    assert model_of(tmp_path / "grown").moe.router_bias_decay_iters == 7


def test_a_model_without_experts_is_refused(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "dense", ConversionConfig(mixers=["full"]))
    with pytest.raises(ConfigurationError, match="has no layers of experts; cut its dense"):
        grow(tmp_path / "dense", tmp_path / "x", Growth([0]))
