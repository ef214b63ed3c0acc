"""Training adapters beside a frozen model: what trains, how it starts, that it goes on, in every layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.architecture.lora import adapter_of
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig, TernaryConfig
from spikingbrain_train.config.lora import LoraConfig, LoraTarget
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.adapted import assert_only_adapters_changed
from tests.distributed.pool import RankFailure, RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, checkpoint_config, run_config, train

ADAPTED = replace(MODEL, lora=LoraConfig(names=["code"], ranks=[2]))
ONE = ParallelConfig()
TOLERANCE = 1e-5
"""Of a loss or gradient norm: sums of another order, and a few steps of AdamW behind them."""

LAYOUTS = {
    "TP 2 + sequence parallel x DP 2, distributed optimizer": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
    ),
    "TP 2 x PP 2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "all is computed again": (1, ParallelConfig(recompute=Recompute.full)),
}


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by name."""
    reader = MegatronCheckpointReader(iteration_folder(folder, iteration))
    held = (name for name in reader.tensors if name.startswith(("decoder.", "embedding.")))
    return {name: reader.read(name) for name in held}


@pytest.fixture(scope="module")
def trained(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_checkpoint: Path
) -> tuple[Path, list[tuple[float, float]]]:
    """A run of four steps of one rank, saved after two of them, and its losses and gradient norms."""
    output = tmp_path_factory.mktemp("adapted")
    config = run_config(
        output, text, model=ADAPTED, checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=2)
    )
    config.stage = replace(config.stage, train_iters=4)
    (steps,) = ranks.run(train, config, world_size=1, parallel=ONE)
    return output, steps


def test_a_new_adapter_starts_from_the_function_of_the_base_and_trains_alone(
    trained: tuple[Path, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    output, steps = trained
    config = run_config(tmp_path, text, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.stage = replace(config.stage, train_iters=1)
    ((of_base,),) = ranks.run(train, config, world_size=1, parallel=ONE)
    assert steps[0][0] == of_base[0]  # B is zero

    before = weights(hybrid_checkpoint, 1)
    after = weights(output / "checkpoints", 4)
    adapters = {name for name in after if adapter_of(name) is not None}
    assert after.keys() - adapters == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].abs().max() > 0 for name in adapters)
    assert sum(after[name].numel() for name in adapters) == kind_of(config.stage).trainable_parameters_in_all(
        ADAPTED
    )


def test_the_optimizer_holds_adapters_alone(trained: tuple[Path, list[tuple[float, float]]]) -> None:
    output, _ = trained
    reader = MegatronCheckpointReader(iteration_folder(output / "checkpoints", 4))
    states = {name for name in reader.tensors if "exp_avg" in name}
    assert states and all(adapter_of(name) for name in states), states


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_rank(
    name: str,
    trained: tuple[Path, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    world_size, parallel = LAYOUTS[name]
    config = run_config(
        tmp_path, text, model=ADAPTED, parallel=parallel, checkpoint=checkpoint_config(hybrid_checkpoint)
    )
    config.stage = replace(config.stage, train_iters=4)
    steps, *_ = ranks.run(train, config, world_size=world_size, parallel=parallel)
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(trained[1]), rtol=TOLERANCE, atol=0)


def test_a_run_with_dropout_goes_on_bit_for_bit(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    world_size, parallel = LAYOUTS["TP 2 x PP 2"]
    model = replace(ADAPTED, lora=replace(ADAPTED.lora, dropout=0.3))
    config = run_config(
        tmp_path,
        text,
        model=model,
        parallel=parallel,
        checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=2),
    )
    config.stage = replace(config.stage, train_iters=3)
    whole = ranks.run(train, config, world_size=world_size, parallel=parallel)
    assert len({tuple(steps) for steps in whole}) == 1
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(iteration_folder(checkpoints, 3))
    (checkpoints / LATEST_ITERATION_FILE).write_text("2\n")
    resumed = ranks.run(train, config, world_size=world_size, parallel=parallel)
    assert resumed == [steps[2:] for steps in whole]


def test_one_of_several_trains_while_the_others_stay(
    trained: tuple[Path, list[tuple[float, float]]], ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    output, _ = trained
    lora = replace(ADAPTED.lora, names=["new", "code"], ranks=[3, 2], trained=["new"])
    config = run_config(
        tmp_path,
        text,
        model=replace(ADAPTED, lora=lora),
        checkpoint=checkpoint_config(output / "checkpoints"),
    )
    config.stage = replace(config.stage, train_iters=2)
    ranks.run(train, config, world_size=1, parallel=ONE)
    before, after = weights(output / "checkpoints", 4), weights(tmp_path / "checkpoints", 2)
    new = {name for name in after if adapter_of(name) == "new"}
    assert after.keys() - new == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].abs().max() > 0 for name in new)


def test_adapters_beside_mamba_spikes_and_ternary_weights_train_alone(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    model = replace(
        MODEL,
        mixers=["mamba", "swa"],
        spiking=SpikingConfig([Projection.mlp_fc2]),
        ternary=TernaryConfig([Projection.mlp_fc1]),
    )
    base = run_config(tmp_path / "base", text, model=model)
    base.stage = replace(base.stage, train_iters=1)
    ranks.run(train, base, world_size=1, parallel=ONE)
    start = tmp_path / "base" / "checkpoints"
    lora = LoraConfig(names=["code"], ranks=[2], target_modules=list(LoraTarget))
    world_size, parallel = LAYOUTS["TP 2 + sequence parallel x DP 2, distributed optimizer"]
    steps = []
    for layout, world in ((ONE, 1), (parallel, world_size)):
        output = tmp_path / f"{world}_ranks"
        config = run_config(
            output,
            text,
            model=replace(model, lora=lora),
            parallel=layout,
            checkpoint=checkpoint_config(start),
        )
        config.stage = replace(config.stage, train_iters=3)
        steps.append(ranks.run(train, config, world_size=world, parallel=layout)[0])
        assert_only_adapters_changed(start, output / "checkpoints")
    torch.testing.assert_close(torch.tensor(steps[1]), torch.tensor(steps[0]), rtol=TOLERANCE, atol=0)


def test_an_adapter_of_another_rank_and_a_forgotten_one_are_refused(
    trained: tuple[Path, list[tuple[float, float]]], ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    output, _ = trained
    for lora, sentence in (
        (replace(ADAPTED.lora, ranks=[4]), "adapter code has rank 2 in the checkpoint, but rank 4"),
        (LoraConfig(), "holds a model with lora.names="),
        (replace(ADAPTED.lora, target_modules=[LoraTarget.q_proj]), "lora.target_modules="),
    ):
        config = run_config(
            tmp_path,
            text,
            model=replace(ADAPTED, lora=lora),
            checkpoint=checkpoint_config(output / "checkpoints"),
        )
        with pytest.raises(RankFailure, match=sentence) as caught:
            ranks.run(train, config, world_size=1, parallel=ONE)
        assert CheckpointError.__name__ in str(caught.value)


REFUSED = {
    "rank": (LoraConfig(names=["a"], ranks=[0]), "model.lora.ranks=.*must be at least 1"),
    "ranks": (LoraConfig(names=["a"], ranks=[2, 3]), "model.lora.ranks has 2 numbers for 1 adapters"),
    "name": (LoraConfig(names=["a.b"]), "name adapters by letters, digits and hyphens"),
    "twice": (LoraConfig(names=["a", "a"]), "model.lora.names lists a more than once"),
    "trained": (LoraConfig(names=["a"], trained=["b"]), "model.lora.trained has b, which"),
    "nothing": (LoraConfig(names=["a"], target_modules=[]), "target_modules is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_make_no_adapters_are_refused(name: str, tmp_path: Path, text: Path) -> None:
    lora, sentence = REFUSED[name]
    with pytest.raises(ConfigurationError, match=sentence):
        check_run_config(run_config(tmp_path, text, model=replace(MODEL, lora=lora)), 1)


def test_adapters_of_nothing_are_refused(tmp_path: Path, text: Path) -> None:
    hybrid = replace(ADAPTED, mixers=["mamba", "full"])
    check_run_config(run_config(tmp_path, text, model=hybrid), 1)
    mamba = replace(ADAPTED, mixers=["mamba"])
    with pytest.raises(ConfigurationError, match="lists q_proj, k_proj, v_proj, o_proj, which no layer has"):
        check_run_config(run_config(tmp_path, text, model=mamba), 1)
    without_mamba = replace(ADAPTED, lora=replace(ADAPTED.lora, target_modules=[LoraTarget.in_proj]))
    with pytest.raises(ConfigurationError, match="lists in_proj, which no layer has"):
        check_run_config(run_config(tmp_path, text, model=without_mamba), 1)
    without = replace(ADAPTED, mixers=["full"], feed_forwards=["no_mlp"])
    with pytest.raises(ConfigurationError, match="lists gate_proj, up_proj, down_proj, which no layer has"):
        check_run_config(run_config(tmp_path, text, model=without), 1)
    aligned = run_config(tmp_path, text, model=ADAPTED)
    aligned.stage = replace(aligned.stage, kind="align", teacher=str(tmp_path))
    with pytest.raises(ConfigurationError, match="stage.kind=align trains mixers"):
        check_run_config(aligned, 1)


def test_a_plan_counts_adapters_and_their_arithmetic(tmp_path: Path, text: Path) -> None:
    config = run_config(tmp_path, text, model=replace(MODEL_76B, lora=ADAPTED.lora))
    kind = kind_of(config.stage)
    experts, others = kind.trainable_parameters(config, 0)
    assert experts + others == kind.trainable_parameters_in_all(config.model)
    plain = kind.flops_per_token(replace(config, model=MODEL_76B))
    assert 2 / 3 * plain < kind.flops_per_token(config) < plain
