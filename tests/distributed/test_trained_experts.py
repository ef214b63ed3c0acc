"""Some experts train alone: what trains, in every layout as on one rank, and a run that goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import OptimizerKind, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.frozen_base import stage_trained
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE, iteration_folder
from tests.distributed.gradients import CASES, Case, assemble, loss_and_gradients, place_of
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, zero
from tests.distributed.small_runs import MODEL_76B, checkpoint_config, run_config, train
from tests.distributed.test_gradients import TOLERANCE, TOPOLOGIES, world_size

ONE = ParallelConfig()
MOE = MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1)
WHOLE = Case(replace(CASES["MoE"].model, feed_forwards=["dense", "moe"], moe=MOE))
"""The first of two layers has no experts: under PP 2 a stage has nothing to train."""
TRAINED = 2
"""Of four experts: under EP 2 one rank has it, and the other nothing to train."""
ALONE = replace(WHOLE, model=replace(WHOLE.model, moe=replace(MOE, trained=[TRAINED])))
EXPERT = "mlp.experts.experts"


def trained_alone(experts: list[int]) -> RunConfig:
    """A run of MODEL_76B."""
    model = replace(MODEL_76B, moe=replace(MODEL_76B.moe, trained=experts))
    return run_config(Path("unused"), Path("unused"), model=model)


@pytest.fixture(scope="module")
def gradients_of_all(ranks: RankPool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients of one rank where the whole model trains."""
    ((loss, shards),) = ranks.run(loss_and_gradients, WHOLE, ONE, world_size=1, parallel=ONE)
    return loss, assemble([shards])


@pytest.mark.parametrize(
    "topology",
    [
        *("TP 2 + sequence parallel", "PP 2", "EP 2", "CP 2, all-gather and halo"),
        *("TP 2 + sequence parallel x CP 2", "PP 2 x EP 2", "EP 2 x CP 2"),
    ],
)
def test_its_gradients_are_those_of_the_whole_models_training_on_one_rank(
    topology: str, ranks: RankPool, gradients_of_all: tuple[float, dict[str, torch.Tensor]]
) -> None:
    parallel = TOPOLOGIES[topology]
    results = ranks.run(
        loss_and_gradients, ALONE, parallel, world_size=world_size(parallel), parallel=parallel
    )
    expected_loss, expected = gradients_of_all
    assert [loss for loss, _ in results] == pytest.approx([expected_loss] * len(results), rel=TOLERANCE)
    covered = {name: torch.zeros_like(value) for name, value in expected.items() if EXPERT in name}
    for shard in (shard for _, shards in results for shard in shards):
        place = place_of(shard.global_offset, tuple(shard.value.shape), shard.global_shape)
        whole = expected[shard.key]
        error = (shard.value.view(whole[place].shape) - whole[place]).abs().max() / whole.abs().max()
        assert error <= TOLERANCE, f"{shard.key} differs by {error:.2e} of its largest gradient"
        covered[shard.key][place] = 1
    for name, seen in covered.items():
        assert seen[TRAINED].all() and not seen[[n for n in range(4) if n != TRAINED]].any(), name


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by name."""
    reader = MegatronCheckpointReader(iteration_folder(folder, iteration))
    held = (name for name in reader.tensors if name.startswith(("decoder.", "embedding.")))
    return {name: reader.read(name) for name in held}


def of_run(folder: Path, text: Path, load: Path, parallel: ParallelConfig = ONE) -> RunConfig:
    """Four steps of expert 3 of MODEL_76B, saved after two."""
    config = run_config(
        folder,
        text,
        model=trained_alone([3]).model,
        parallel=parallel,
        checkpoint=checkpoint_config(load, save_interval=2),
    )
    config.stage = replace(config.stage, train_iters=4)
    return config


@pytest.fixture(scope="module")
def trained(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text: Path, hybrid_76b_checkpoint: Path
) -> tuple[Path, list[tuple[float, float]]]:
    """Checkpoints of :func:`of_run` by one rank, and its losses and gradient norms."""
    output = tmp_path_factory.mktemp("expert")
    config = of_run(output, text, hybrid_76b_checkpoint)
    (steps,) = ranks.run(train, config, world_size=1, parallel=ONE)
    return output / "checkpoints", steps


def test_nothing_but_the_experts_changes(
    trained: tuple[Path, list[tuple[float, float]]], hybrid_76b_checkpoint: Path
) -> None:
    before, after = weights(hybrid_76b_checkpoint, 1), weights(trained[0], 4)
    assert before.keys() == after.keys()
    changed = 0
    for name, value in after.items():
        if EXPERT not in name:
            assert torch.equal(value, before[name]), name
            continue
        assert torch.equal(value[:3], before[name][:3]), name
        assert (value[3] != before[name][3]).any(), name
        changed += value[3].numel()
    model = trained_alone([3]).model
    assert changed == kind_of(trained_alone([3]).stage).trainable_parameters_in_all(model)


def test_the_optimizer_holds_the_experts_alone(trained: tuple[Path, list[tuple[float, float]]]) -> None:
    reader = MegatronCheckpointReader(iteration_folder(trained[0], 4))
    states = {name for name in reader.tensors if "exp_avg" in name}
    assert states and all(EXPERT in name for name in states), states


LAYOUTS = {
    "EP 2, distributed optimizer, overlap": (
        2,
        ParallelConfig(
            expert_model_parallel_size=2,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    ),
    "TP 2 + sequence parallel x PP 2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2),
    ),
    "PP 2 x EP 2, distributed optimizer": (
        4,
        ParallelConfig(
            pipeline_model_parallel_size=2, expert_model_parallel_size=2, use_distributed_optimizer=True
        ),
    ),
    "all is computed again": (1, ParallelConfig(recompute=Recompute.full)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_rank(
    name: str,
    trained: tuple[Path, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_76b_checkpoint: Path,
) -> None:
    size, parallel = LAYOUTS[name]
    config = of_run(tmp_path, text, hybrid_76b_checkpoint, parallel)
    steps, *_ = ranks.run(train, config, world_size=size, parallel=parallel)
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(trained[1]), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ["EP 2, distributed optimizer, overlap", "TP 2 + sequence parallel x PP 2"])
def test_a_run_goes_on_bit_for_bit(
    name: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_76b_checkpoint: Path
) -> None:
    size, parallel = LAYOUTS[name]
    config = of_run(tmp_path, text, hybrid_76b_checkpoint, parallel)
    whole = ranks.run(train, config, world_size=size, parallel=parallel)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(iteration_folder(checkpoints, 4))
    (checkpoints / LATEST_ITERATION_FILE).write_text("2\n")
    resumed = ranks.run(train, config, world_size=size, parallel=parallel)
    assert resumed == [steps[2:] for steps in whole]


@pytest.mark.parametrize(
    "parallel",
    [
        case(each, engine=each.engine, name=name)
        for name, each in {"ZeRO 2": zero(2), "ZeRO 3": zero(3), "FSDP": fsdp()}.items()
    ],
)
def test_other_engines_train_as_one_rank_and_megatron_goes_on_with_their_moments(
    parallel: ParallelConfig,
    trained: tuple[Path, list[tuple[float, float]]],
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_76b_checkpoint: Path,
) -> None:
    config = of_run(tmp_path, text, hybrid_76b_checkpoint, parallel)
    steps, _ = ranks.run(train, config, world_size=2, parallel=parallel)
    expected = torch.tensor(trained[1])
    torch.testing.assert_close(torch.tensor(steps)[:, 0], expected[:, 0], rtol=TOLERANCE, atol=0)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(iteration_folder(checkpoints, 4))
    (checkpoints / LATEST_ITERATION_FILE).write_text("2\n")
    (resumed,) = ranks.run(train, replace(config, parallel=ONE), world_size=1, parallel=ONE)
    torch.testing.assert_close(torch.tensor(resumed)[:, 0], expected[2:, 0], rtol=TOLERANCE, atol=0)


def test_a_plan_counts_the_experts_of_the_rank_that_has_most() -> None:
    model = trained_alone([1, 2, 3]).model
    per_expert = 2 * 3 * model.hidden_size * model.ffn_hidden_size  # two layers of gate, up and down
    assert kind_of(trained_alone([]).stage).trainable_parameters_in_all(model) == 3 * per_expert
    halves = ParallelConfig(expert_model_parallel_size=2)
    assert stage_trained(model, ONE, 0) == (3 * per_expert, 0)
    assert stage_trained(model, halves, 0) == (2 * per_expert, 0)
    config = trained_alone([1])
    kind = kind_of(config.stage)
    whole = kind.flops_per_token(trained_alone([]))
    assert 2 / 3 * whole < kind.flops_per_token(config) < whole


def test_settings_that_leave_no_experts_to_train_are_refused(tmp_path: Path, text: Path) -> None:
    def refused(sentence: str, config: RunConfig) -> None:
        with pytest.raises(ConfigurationError, match=sentence):
            check_run_config(
                replace(config, data=run_config(tmp_path, text).data), world_size(config.parallel)
            )

    refused(r"model.moe.trained lists 4, 7, but the experts are 0 to 3", trained_alone([4, 1, 7]))
    refused(r"model.moe.trained lists 1 more than once", trained_alone([1, 1]))
    dense = trained_alone([1])
    dense.model = replace(dense.model, feed_forwards=["dense"])
    refused(r"model.feed_forwards has no layers of experts", dense)
    adapted = trained_alone([1])
    adapted.model = replace(adapted.model, lora=LoraConfig(names=["code"]))
    refused(r"and so do the adapters of the model; set it to \[\], or merge", adapted)
    copied = trained_alone([1])
    copied.parallel = ParallelConfig(replicate_expert_load=2.0, expert_model_parallel_size=2)
    refused(r"parallel.replicate_expert_load=2.0 copies experts to ranks whose own", copied)
    aligned = trained_alone([1])
    aligned.stage = replace(aligned.stage, kind="align", teacher=str(tmp_path))
    refused(r"stage.kind=align trains mixers, but model.moe.trained has some experts", aligned)
    muon = trained_alone([1])
    muon.optimizer = replace(muon.optimizer, kind=OptimizerKind.muon)
    refused(r"but experts 1 of every layer that has experts train alone", muon)
