"""An interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision, RunConfig, WandbMode
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import (
    CHECKPOINT_FOLDER,
    LATEST_ITERATION_FILE,
    iteration_folder,
    latest_checkpoint,
)
from spikingbrain_train.training.callbacks.weights_and_biases import WANDB_RUN_ID_FILE, WeightsAndBiases
from tests.distributed.pool import RankFailure, RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    checkpoint_config,
    run_config,
    train,
    train_and_not_save,
)


def _interrupt_after(output_dir: Path, iteration: int) -> None:
    """Leave ``output_dir`` as it was when ``iteration`` had been saved."""
    checkpoints = output_dir / "checkpoints"
    for folder in checkpoints.glob("iter_*"):
        if folder != iteration_folder(checkpoints, iteration):
            shutil.rmtree(folder)
    (checkpoints / LATEST_ITERATION_FILE).write_text(f"{iteration}\n")


LAYOUTS = {
    "one rank, bf16": (1, ParallelConfig(), Precision.bf16),
    "one rank, fp32": (1, ParallelConfig(), Precision.fp32),
    "TP 2 x PP 2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        Precision.fp32,
    ),
    "PP 2 of 2 virtual stages, distributed optimizer, bf16": (
        2,
        ParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            use_distributed_optimizer=True,
        ),
        Precision.bf16,
    ),
    "DP 2, distributed optimizer, bf16": (2, ParallelConfig(use_distributed_optimizer=True), Precision.bf16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    layout: str, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    world_size, parallel, precision = LAYOUTS[layout]
    config = run_config(
        tmp_path,
        text,
        parallel=parallel,
        precision=precision,
        checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=3),
    )
    config.stage = replace(config.stage, train_iters=5, micro_batch_size=2)
    uninterrupted = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)
    points = read_metrics(tmp_path)
    _interrupt_after(tmp_path, 3)

    resumed = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)

    assert [len(steps) for steps in resumed] == [2] * world_size
    assert resumed == [steps[3:] for steps in uninterrupted]
    assert [point["train/loss"] for point in read_metrics(tmp_path)] == [
        point["train/loss"] for point in points
    ]


def _shrunk(name: str) -> tuple[int, ParallelConfig]:
    """A layout of conf/parallel with degrees of at most 2 on at most four ranks, and the number of ranks."""
    settings = OmegaConf.merge(
        OmegaConf.structured(ParallelConfig), OmegaConf.load(conf_folder() / "parallel" / f"{name}.yaml")
    )
    degrees = [setting for setting in settings if setting.endswith("_parallel_size")]
    for degree in degrees:
        if (settings[degree] or 1) > 1:
            settings[degree] = 2
    parallel = OmegaConf.to_object(settings)
    parallel.data_parallel_size = 2 if parallel.model_parallel_size <= 2 else 1
    return parallel.model_parallel_size * parallel.data_parallel_size, parallel


def _layouts_of_experiments() -> dict[str, tuple[int, list[ParallelConfig]]]:
    """Number of ranks and small forms of every layout in conf/parallel that is for experiments or many GPUs.

    Those that differ in what is computed again only, which may change no bit, are forms of one: a run goes on
    in the other.
    """
    found: dict[str, tuple[str, int, list[ParallelConfig]]] = {}
    for name in sorted(layout.stem for layout in (conf_folder() / "parallel").glob("dp*.yaml")):
        world_size, parallel = _shrunk(name)
        key = repr(replace(parallel, recompute=Recompute.none))
        first, _, forms = found.setdefault(key, (name, world_size, []))
        if parallel not in forms:
            forms.append(parallel)
            found[key] = (first if len(forms) == 1 else f"{first}, {name}", world_size, forms)
    return {name: (world_size, forms) for name, world_size, forms in found.values()}


LAYOUTS_OF_EXPERIMENTS = _layouts_of_experiments()


@pytest.mark.parametrize("layout", LAYOUTS_OF_EXPERIMENTS)
def test_a_resumed_run_repeats_the_uninterrupted_one_in_the_experiments_layouts(
    layout: str,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
) -> None:
    world_size, (parallel, *others) = LAYOUTS_OF_EXPERIMENTS[layout]
    has_experts = parallel.expert_model_parallel_size > 1
    config = run_config(
        tmp_path,
        text,
        model=MODEL_76B if has_experts else MODEL,
        parallel=parallel,
        precision=Precision.bf16,  # the experiments' own, with the most state: fp32 copies beside the weights
        checkpoint=checkpoint_config(
            hybrid_76b_checkpoint if has_experts else hybrid_checkpoint, save_interval=2
        ),
    )
    config.stage = replace(config.stage, train_iters=4, micro_batch_size=2)
    uninterrupted = ranks.run(train_and_not_save, config, world_size=world_size, parallel=parallel)

    for then in others or [parallel]:
        config.parallel = then
        resumed = ranks.run(train_and_not_save, config, world_size=world_size, parallel=then)

        assert [len(steps) for steps in resumed] == [2] * world_size
        assert resumed == [steps[2:] for steps in uninterrupted]


def _train_with_buckets_of_one_parameter(groups, config: RunConfig) -> list[tuple[float, float]]:
    from spikingbrain_train.training import build

    ddp_config = build.DistributedDataParallelConfig
    build.DistributedDataParallelConfig = partial(ddp_config, bucket_size=1)
    try:
        return train(groups, config)
    finally:
        build.DistributedDataParallelConfig = ddp_config


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "model", [replace(MODEL, share_embeddings_and_output_weights=False), MODEL_76B], ids=["hybrid", "76b"]
)
def test_overlapped_gathering_trains_and_saves_as_gathering_at_once_does(
    model: ModelConfig, precision: Precision, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """A large model's weights lie in many buckets, each gathered when a module first reads from it."""
    at_once = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    overlapped = replace(at_once, overlap_param_gather=True)
    losses, saved = [], []
    for name, parallel in {"at_once": at_once, "overlapped": overlapped}.items():
        config = run_config(tmp_path / name, text, model=model, parallel=parallel, precision=precision)
        config.stage = replace(config.stage, train_iters=3, micro_batch_size=2)
        losses.append(
            ranks.run(_train_with_buckets_of_one_parameter, config, world_size=2, parallel=parallel)
        )
        saved.append(
            MegatronCheckpointReader(latest_checkpoint(tmp_path / name / CHECKPOINT_FOLDER, "output_dir"))
        )
    assert losses[0] == losses[1]
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    for name in saved[0].tensors:
        assert torch.equal(saved[0].read(name), saved[1].read(name)), name


def test_optimizer_states_of_many_buckets_are_those_that_the_plain_optimizer_saves(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Buckets end in padding, and parts of parameters lie on either rank."""
    plain = ParallelConfig(overlap_grad_reduce=True)
    saved = []
    for name, parallel in {"plain": plain, "cut": replace(plain, use_distributed_optimizer=True)}.items():
        config = run_config(tmp_path / name, text, parallel=parallel)
        config.stage = replace(config.stage, train_iters=2)
        ranks.run(_train_with_buckets_of_one_parameter, config, world_size=2, parallel=parallel)
        saved.append(
            MegatronCheckpointReader(latest_checkpoint(tmp_path / name / CHECKPOINT_FOLDER, "output_dir"))
        )
    names = [name for name in saved[1].tensors if name.startswith("optimizer.state.exp_avg")]
    assert len(names) > 50
    for name in names:
        torch.testing.assert_close(saved[1].read(name), saved[0].read(name), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["plain", "distributed optimizer"])
def test_a_run_saved_at_tp2_pp2_resumes_at_dp2(
    distributed_optimizer: bool, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    split = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        use_distributed_optimizer=distributed_optimizer,
    )
    config = run_config(
        tmp_path, text, parallel=split, checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=3)
    )
    config.stage = replace(config.stage, train_iters=6, micro_batch_size=2)
    uninterrupted, *_ = ranks.run(train_and_not_save, config, world_size=4, parallel=split)
    _interrupt_after(tmp_path, 3)
    replicas = ParallelConfig(use_distributed_optimizer=distributed_optimizer)

    resumed, *_ = ranks.run(
        train_and_not_save, replace(config, parallel=replicas), world_size=2, parallel=replicas
    )

    # Other sums, other rounding: the bound is 1e-4, what is seen is below 1e-5.
    assert [loss for loss, _ in resumed] == pytest.approx([loss for loss, _ in uninterrupted[3:]], rel=1e-4)


_EVEN = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True)
_UNEVEN = replace(_EVEN, pipeline_model_parallel_layout=[1, 3])
_VIRTUAL = replace(_EVEN, virtual_pipeline_model_parallel_size=2)


@pytest.mark.parametrize(
    ("before", "after"),
    [(_EVEN, _UNEVEN), (_EVEN, _VIRTUAL), (_VIRTUAL, _EVEN)],
    ids=["uneven ones", "virtual ones", "even ones, from virtual ones"],
)
def test_a_run_saved_by_pipeline_stages_resumes_by(
    before: ParallelConfig,
    after: ParallelConfig,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
) -> None:
    config = run_config(
        tmp_path, text, parallel=before, checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=3)
    )
    config.stage = replace(config.stage, train_iters=6, micro_batch_size=2)
    uninterrupted, *_ = ranks.run(train_and_not_save, config, world_size=2, parallel=before)
    _interrupt_after(tmp_path, 3)

    resumed, *_ = ranks.run(train_and_not_save, replace(config, parallel=after), world_size=2, parallel=after)

    assert [loss for loss, _ in resumed] == pytest.approx([loss for loss, _ in uninterrupted[3:]], rel=1e-5)


def test_a_run_that_is_done_resumes_to_nothing(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = run_config(tmp_path, text, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.stage = replace(config.stage, train_iters=2)
    ranks.run(train, config, world_size=1, parallel=ParallelConfig())

    assert ranks.run(train, config, world_size=1, parallel=ParallelConfig()) == [[]]


def test_old_checkpoints_are_removed_when_only_the_last_are_kept(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = run_config(
        tmp_path, text, checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=2, keep_last=2)
    )
    ranks.run(train, config, world_size=1, parallel=ParallelConfig())

    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("iter_*")) == [
        "iter_0000008",
        "iter_0000010",
    ]


def _message_of_failure(groups, config: RunConfig) -> str:
    try:
        train(groups, config)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_of_another_architecture_is_refused_on_every_rank(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = run_config(tmp_path, text, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.model = replace(config.model, ffn_hidden_size=64)

    messages = ranks.run(_message_of_failure, config, world_size=2, parallel=ParallelConfig())

    for message in messages:
        assert "ffn_hidden_size=48" in message and "model=from_checkpoint" in message
    assert not list(tmp_path.iterdir())


def test_a_truncated_checkpoint_is_refused_on_every_rank(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(hybrid_checkpoint, damaged)
    for shard in damaged.glob("iter_*/*.distcp"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    config = run_config(tmp_path / "out", text, checkpoint=checkpoint_config(damaged))

    messages = ranks.run(_message_of_failure, config, world_size=2, parallel=ParallelConfig())

    assert all("checkpoint.load" in message and "damaged" in message for message in messages)


def test_a_diverging_run_stops_with_advice(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = run_config(tmp_path, text, checkpoint=checkpoint_config(hybrid_checkpoint))
    config.optimizer = replace(config.optimizer, lr=1e30, clip_grad=0.0)

    with pytest.raises(RankFailure, match=r"lower optimizer\.lr"):
        ranks.run(train, config, world_size=1, parallel=ParallelConfig())


def _config_in_wandb(groups, config: RunConfig) -> tuple[str, dict]:
    """The id and the config of the W&B run that a trainer opens."""
    from spikingbrain_train.training.callbacks.evaluation import Evaluation
    from spikingbrain_train.training.trainer import Trainer

    callbacks = Trainer(config, groups).callbacks
    (wandb,) = (each for each in callbacks if isinstance(each, WeightsAndBiases))
    started = [callback for callback in callbacks if not isinstance(callback, Evaluation)]
    for callback in started:
        callback.start()
    shown = wandb._wandb.id, dict(wandb._wandb.config)
    for callback in reversed(started):
        callback.end(None)
    return shown


def test_a_run_in_wandb_carries_its_config_and_goes_on_under_its_id(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = run_config(tmp_path, text, checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=6))
    config.logging = replace(config.logging, wandb=WandbMode.offline)
    config.stage = replace(config.stage, train_iters=6)
    ranks.run(train, config, world_size=1, parallel=ParallelConfig())
    first = (tmp_path / WANDB_RUN_ID_FILE).read_text().strip()

    config.stage = replace(config.stage, train_iters=10)
    ((run_id, shown),) = ranks.run(_config_in_wandb, config, world_size=1, parallel=ParallelConfig())

    assert run_id == first
    assert shown["stage"]["train_iters"] == 10 and shown["model"]["mixers"][0] == "gla"
    assert shown["optimizer"]["lr"] == config.optimizer.lr and shown["precision"] == "fp32"
