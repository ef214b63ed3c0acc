"""spikingbrain-bricks train and update: a part trains, all else stays bit for bit, runs go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.architecture.lora import adapter_of
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.bricks.changed_weights import check_only_adapter_changed, check_only_experts_changed
from spikingbrain_train.bricks.command_line import bricks
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from tests.distributed import small_runs
from tests.distributed.pool import RankPool

NAMES = ["code", "other"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def adapted(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Checkpoints of a run with two adapters, one step behind its beginning."""
    output = tmp_path_factory.mktemp("update") / "adapted"
    base = small_runs.run_config(output.with_name("base"), text)
    base.stage = replace(base.stage, train_iters=1)
    ranks.run(small_runs.train, base, world_size=1, parallel=ParallelConfig())
    model = replace(small_runs.MODEL, lora=LoraConfig(names=NAMES, ranks=[2]))
    load = small_runs.checkpoint_config(output.with_name("base") / "checkpoints")
    config = small_runs.run_config(output, text, model=model, checkpoint=load)
    config.stage = replace(config.stage, train_iters=1)
    ranks.run(small_runs.train, config, world_size=1, parallel=ParallelConfig())
    return output


@pytest.fixture(scope="module")
def mixture(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Checkpoints of a run with four experts in every second layer, whose routers have biases."""
    output = tmp_path_factory.mktemp("update") / "mixture"
    moe = replace(small_runs.MODEL_76B.moe, router_bias=True, router_bias_decay_iters=2)
    config = small_runs.run_config(output, text, model=replace(small_runs.MODEL_76B, moe=moe))
    config.stage = replace(config.stage, train_iters=1)
    config.optimizer.lr_warmup_iters = 0
    ranks.run(small_runs.train, config, world_size=1, parallel=ParallelConfig())
    return output


def update(adapted: Path, output: Path, *words: str, adapter: str = "other") -> None:
    bricks(["update", "--checkpoint", str(adapted), "--adapter", adapter, "--output", str(output), *words])


def update_experts(mixture: Path, experts: str, output: Path, *words: str) -> None:
    bricks(["update", "--checkpoint", str(mixture), "--experts", experts, "--output", str(output), *words])


def train(checkpoint: Path, output: Path, *words: str, adapter: str = "third") -> None:
    bricks(["train", "--checkpoint", str(checkpoint), "--adapter", adapter, "--output", str(output), *words])


def settings(text: Path, iters: int) -> list[str]:
    return [
        *("stage=cpt", f"data.train=[{text}]", f"stage.train_iters={iters}", "stage.seq_length=32"),
        *("stage.global_batch_size=4", "precision=fp32", "cluster=cpu", "logging.tensorboard=false"),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = MegatronCheckpointReader(latest_checkpoint(folder / "checkpoints", "folder"))
    held = (name for name in reader.tensors if name.startswith(("decoder.", "embedding.")))
    return {name: reader.read(name) for name in held}


@pytest.mark.slow
def test_one_adapter_changes_and_the_same_command_goes_on(
    adapted: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    update(adapted, tmp_path / "updated", *settings(text, 1))
    assert "adapter other is trained; the other" in capfd.readouterr().out
    before, after = weights(adapted), weights(tmp_path / "updated")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if adapter_of(name) == "other"}
    update(adapted, tmp_path / "updated", *settings(text, 2))
    newest = latest_checkpoint(tmp_path / "updated" / "checkpoints", "folder")
    assert newest.name == "iter_0000002"
    with pytest.raises(CheckpointError, match="which adapter code does not own"):
        check_only_adapter_changed(adapted, tmp_path / "updated", "code")


@pytest.mark.slow
def test_some_experts_change_and_the_same_command_goes_on(
    mixture: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = ["--ranks", "2", "parallel.expert_model_parallel_size=2"]
    update_experts(mixture, "3,0", tmp_path / "updated", *layout, *settings(text, 1))
    assert "experts 0, 3 are trained; the other" in capfd.readouterr().out
    before, after = weights(mixture), weights(tmp_path / "updated")
    for name, value in after.items():
        is_routed = "experts.experts" in name
        for row in range(4) if is_routed else [...]:
            assert torch.equal(value[row], before[name][row]) is not (is_routed and row in (0, 3)), name
    update_experts(mixture, "3,0", tmp_path / "updated", *layout, *settings(text, 2))
    newest = latest_checkpoint(tmp_path / "updated" / "checkpoints", "folder")
    assert newest.name == "iter_0000002"
    with pytest.raises(CheckpointError, match="which experts 3 do not own"):
        check_only_experts_changed(mixture, tmp_path / "updated", [3])


def test_a_dry_run_prints_the_command(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update(adapted, tmp_path / "x", "--dry-run", "--ranks", "2", "stage.train_iters=3")
    line = capsys.readouterr().out.strip()
    assert line.startswith("spikingbrain-train --nproc-per-node 2 model=from_checkpoint checkpoint.load=")
    assert "model.lora.trained=[other]" in line and line.endswith("stage.train_iters=3")
    assert not (tmp_path / "x").exists()


def test_a_dry_run_prints_the_command_for_experts(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update_experts(mixture, "3,1", tmp_path / "x", "--dry-run")
    assert "model.moe.trained=[1,3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "experts", "words", "sentence"),
    [
        ("mixture", "4", (), "--experts 4 names expert 4, but those of"),
        ("mixture", "1;2", (), "--experts 1;2 is no list of numbers"),
        ("mixture", "1", ("model.moe.trained=[2]",), "update sets model.moe.trained itself"),
        ("adapted", "1", (), "has no layers of experts; cut its feed-forwards"),
    ],
)
def test_experts_that_are_not_there_are_refused_in_one_sentence(
    folder: str,
    experts: str,
    words: tuple[str, ...],
    sentence: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        update_experts(request.getfixturevalue(folder), experts, tmp_path / "x", *words)
    assert sentence in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("adapter", "words", "sentence"),
    [
        ("third", (), "--adapter third is no adapter of"),
        ("code", ("--ranks", "0"), "--ranks is 0; give at least 1"),
        ("code", ("output_dir=y",), "update sets output_dir itself; leave output_dir=y out"),
    ],
)
def test_what_cannot_be_updated_is_refused_in_one_sentence(
    adapter: str,
    words: tuple[str, ...],
    sentence: str,
    adapted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        update(adapted, tmp_path / "x", *words, adapter=adapter)
    assert sentence in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["adapted", "base"])
def test_a_new_adapter_changes_nothing_else_and_the_same_command_goes_on(
    beside: str, adapted: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, trained = adapted.with_name(beside), tmp_path / "trained"
    own = ["--rank", "3", "--alpha", "6"]
    train(checkpoint, trained, *own, *settings(text, 1))
    assert "adapter third is trained; the other" in capfd.readouterr().out
    before, after = weights(checkpoint), weights(trained)
    new = {name for name in after if adapter_of(name) == "third"}
    assert new == after.keys() - before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(after[name].abs().max() > 0 for name in new)
    newest = latest_checkpoint(trained / "checkpoints", "folder")
    lora = read_stored_model(newest).lora
    names = NAMES if beside == "adapted" else []
    assert lora.names == [*names, "third"]
    assert [lora.rank(name) for name in lora.names] == [*(2 for _ in names), 3]
    assert (lora.alpha("third"), lora.trained) == (6.0, ["third"])
    train(checkpoint, trained, *own, *settings(text, 2))
    assert latest_checkpoint(trained / "checkpoints", "folder").name == "iter_0000002"


def test_a_dry_run_of_a_new_adapter_keeps_what_the_others_have(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(adapted, tmp_path / "x", "--dry-run", "--rank", "4", "stage.train_iters=3")
    line = capsys.readouterr().out.strip()
    assert "'model.lora.names=[code,other,third]' 'model.lora.ranks=[2,2,4]'" in line
    assert "'model.lora.trained=[third]'" in line and line.endswith("stage.train_iters=3")
    train(adapted.with_name("base"), tmp_path / "x", "--dry-run", "--target-modules", "q_proj,v_proj")
    line = capsys.readouterr().out
    assert "'model.lora.names=[third]' " in line and "'model.lora.target_modules=[q_proj,v_proj]'" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--adapter", "code"), "--adapter code is an adapter of"),
        (("--adapter", "a.b"), "model.lora.names has 'a.b'"),
        (("--rank", "0"), "--rank is 0 and --alpha 16; give a rank of at least 1"),
        (("--alpha", "-1"), "--rank is 8 and --alpha -1; give a rank"),
        (("--target-modules", "qkv"), "--target-modules has qkv, which is none of q_proj,"),
        (("--target-modules", "q_proj"), "--target-modules q_proj are others than those of code, other in"),
        (("model.lora.ranks=[3]",), "train sets model.lora.ranks itself; leave model.lora.ranks=[3] out"),
    ],
)
def test_a_new_adapter_that_does_not_fit_is_refused_in_one_sentence(
    words: tuple[str, ...],
    sentence: str,
    adapted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train(adapted, tmp_path / "x", *words)
    assert sentence in capsys.readouterr().err.replace("\n", " ")
