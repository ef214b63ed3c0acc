"""Muon updates matrices as one rank would, on every topology, and goes on from its checkpoints.

Newton-Schulz multiplies fp32. Tolerance 1e-5 relative of losses and gradient norms, as for AdamW: sums that
ranks split are rounded otherwise (1e-7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import OptimizerConfig, OptimizerKind, Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import (
    MODEL,
    MODEL_76B,
    checkpoint_config,
    run_config,
    train,
    train_and_not_save,
)

TOLERANCE = 1e-5
STEPS = 4
OPTIMIZER = OptimizerConfig(
    kind=OptimizerKind.muon,
    lr=1e-2,
    lr_warmup_iters=1,
    clip_grad=0.5,
    new_parameter_lr_mult=3.0,
    adam_eps=1e-6,
    muon_precision=Precision.fp32,
)
MAMBA = replace(MODEL, mixers=["mamba", "full"], mamba=MambaConfig(intermediate_size=32, state_size=4))
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
ZERO = ParallelConfig(use_distributed_optimizer=True)
CASES: dict[str, tuple[str, int, ParallelConfig]] = {
    "TP 2": ("hybrid", 2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2, Mamba": ("mamba", 2, TP2),
    "TP 2, whole experts": ("experts", 2, replace(TP2, expert_tensor_parallel_size=1)),
    "PP 2 of 2 virtual stages": (
        "hybrid",
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "EP 2": ("experts", 2, ParallelConfig(expert_model_parallel_size=2)),
    "CP 2": ("hybrid", 2, ParallelConfig(context_parallel_size=2)),
    "DP 2": ("hybrid", 2, ParallelConfig()),
    "DP 2, distributed optimizer": ("hybrid", 2, ZERO),
    "DP 4, distributed optimizer": ("hybrid", 4, ZERO),
    "EP 2 x DP 2, distributed optimizer": ("experts", 4, replace(ZERO, expert_model_parallel_size=2)),
    "TP 2 x DP 2, distributed optimizer": ("experts", 4, replace(TP2, use_distributed_optimizer=True)),
    "PP 2 x CP 2, overlapped distributed optimizer": (
        "hybrid",
        4,
        ParallelConfig(
            pipeline_model_parallel_size=2,
            context_parallel_size=2,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
        ),
    ),
}


@dataclass
class Start:
    """Where runs of a model begin."""

    model: ModelConfig
    checkpoint: Path
    text: Path

    def config(self, folder: Path, parallel: ParallelConfig, save_interval: int) -> RunConfig:
        """Some steps of Muon."""
        return run_config(
            folder,
            self.text,
            model=self.model,
            parallel=parallel,
            optimizer=replace(OPTIMIZER),
            stage=StageConfig(train_iters=STEPS, seq_length=32, global_batch_size=4, micro_batch_size=1),
            checkpoint=checkpoint_config(self.checkpoint, save_interval=save_interval),
        )


@pytest.fixture(scope="module")
def starts(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
) -> dict[str, Start]:
    """Weights that every topology reads: ranks would draw others."""
    folder = tmp_path_factory.mktemp("mamba")
    config = run_config(folder, text, model=MAMBA)
    config.stage = StageConfig(train_iters=1, seq_length=32, global_batch_size=1)
    config.optimizer.lr_warmup_iters = 0
    ranks.run(train, config, world_size=1, parallel=ParallelConfig())
    return {
        "hybrid": Start(MODEL, hybrid_checkpoint, text),
        "experts": Start(MODEL_76B, hybrid_76b_checkpoint, text),
        "mamba": Start(MAMBA, folder / "checkpoints", text),
    }


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, starts: dict[str, Start]
) -> dict[str, tuple[list[tuple[float, float]], Path]]:
    """Losses and gradient norms of every model on one rank, and its checkpoint."""
    found = {}
    for name, start in starts.items():
        folder = tmp_path_factory.mktemp("one_rank")
        config = start.config(folder, ParallelConfig(), STEPS)
        (steps,) = ranks.run(train, config, world_size=1, parallel=ParallelConfig())
        found[name] = (steps, folder / "checkpoints")
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_topology_trains_as_one_rank_does(
    case: str, ranks: RankPool, tmp_path: Path, starts: dict[str, Start], one_rank: dict[str, tuple]
) -> None:
    """Also what its checkpoint holds: momenta, moments and weights are those of one rank."""
    model, world_size, parallel = CASES[case]
    expected, saved = one_rank[model]
    config = starts[model].config(tmp_path, parallel, STEPS)
    for steps in ranks.run(train, config, world_size=world_size, parallel=parallel):
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=TOLERANCE, atol=0)
    _hold_the_same(saved, tmp_path / "checkpoints")


def _hold_the_same(one: Path, other: Path) -> None:
    readers = [MegatronCheckpointReader(latest_checkpoint(each, "output_dir")) for each in (one, other)]
    main = "optimizer.state.param."  # the distributed optimizer's, also where weights are fp32
    names = [{n for n in reader.tensors if not n.startswith((main, "generators."))} for reader in readers]
    assert names[0] == names[1]
    assert any(name.startswith("optimizer.state.momentum_buffer.") for name in names[0])
    for name in names[0]:
        a, b = (reader.read(name).float() for reader in readers)
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_matrices_have_a_momentum_and_no_moments(one_rank: dict[str, tuple]) -> None:
    reader = MegatronCheckpointReader(latest_checkpoint(one_rank["experts"][1], "output_dir"))
    kinds: dict[str, set[str]] = {"momentum_buffer": set(), "exp_avg": set()}
    for name in reader.tensors:
        for kind, of_kind in kinds.items():
            if name.startswith(f"optimizer.state.{kind}."):
                of_kind.add(name.removeprefix(f"optimizer.state.{kind}."))
    assert not kinds["momentum_buffer"] & kinds["exp_avg"]
    assert {name.rpartition("layers.")[2].partition(".")[2] for name in kinds["momentum_buffer"]} == {
        *(
            f"self_attention.{mixer}.linear_{of}.weight"
            for mixer in ("linear_attention", "softmax_attention")
            for of in ("qkv", "proj")
        ),
        *("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
        *(f"mlp.{of}.linear_fc{n}.weight" for of in ("experts.experts", "shared_experts") for n in (1, 2)),
    }


RESUMED: dict[str, tuple[str, int, ParallelConfig, Precision]] = {
    "one rank, bf16": ("hybrid", 1, ParallelConfig(), Precision.bf16),
    "TP 2": ("experts", 2, TP2, Precision.fp32),
    "DP 2, distributed optimizer": ("hybrid", 2, ZERO, Precision.fp32),
    "EP 2, distributed optimizer, bf16": (
        "experts",
        2,
        replace(ZERO, expert_model_parallel_size=2),
        Precision.bf16,
    ),
}


def _resumed(
    ranks: RankPool, config: RunConfig, world_size: int, changed: ParallelConfig, changed_size: int
) -> list[list[tuple[float, float]]]:
    """A run that stops after two steps and goes on."""
    ranks.run(train, config, 2, world_size=world_size, parallel=config.parallel)
    config.parallel = changed
    return ranks.run(train_and_not_save, config, world_size=changed_size, parallel=changed)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    case: str, ranks: RankPool, tmp_path: Path, starts: dict[str, Start]
) -> None:
    model, world_size, parallel, precision = RESUMED[case]
    configs = [starts[model].config(tmp_path / name, parallel, 2) for name in ("whole", "resumed")]
    for config in configs:
        config.precision, config.optimizer.muon_precision = precision, Precision.auto
    whole = ranks.run(train_and_not_save, configs[0], world_size=world_size, parallel=parallel)
    resumed = _resumed(ranks, configs[1], world_size, parallel, world_size)
    assert [len(steps) for steps in resumed] == [2] * world_size
    assert resumed == [steps[2:] for steps in whole]


@pytest.mark.parametrize(
    ("model", "before", "behind"),
    [
        pytest.param(
            "experts", (2, TP2), (2, ParallelConfig(expert_model_parallel_size=2)), id="TP 2 to EP 2"
        ),
        pytest.param(
            "hybrid", (2, ZERO), (4, replace(TP2, use_distributed_optimizer=True)), id="DP 2 to TP 2 x DP 2"
        ),
    ],
)
def test_a_run_goes_on_at_another_topology(
    model: str,
    before: tuple[int, ParallelConfig],
    behind: tuple[int, ParallelConfig],
    ranks: RankPool,
    tmp_path: Path,
    starts: dict[str, Start],
    one_rank: dict[str, tuple],
) -> None:
    config = starts[model].config(tmp_path, before[1], 2)
    for steps in _resumed(ranks, config, before[0], behind[1], behind[0]):
        expected = torch.tensor(one_rank[model][0][2:])
        torch.testing.assert_close(torch.tensor(steps), expected, rtol=TOLERANCE, atol=0)
