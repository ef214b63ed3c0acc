"""Runs whose AdamW is Transformer Engine's or Apex's, which megatron-core takes where it finds them.

Here torch computes what their kernels do. Checkpoints know no difference: a run goes on with either.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.parallel import EngineKind, ParallelConfig
from spikingbrain_train.config.run import OptimizerKind, Precision, RunConfig
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_folder import iteration_folder
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, zero
from tests.distributed.small_runs import checkpoint_config, run_config, train_and_not_save

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups


class FusedAdam(torch.optim.Optimizer):
    """As transformer_engine.pytorch.optimizers.FusedAdam: groups count steps, those with parameters."""

    updates = 0

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert not amsgrad and adam_w_mode and not capturable
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                assert state.keys() == {"exp_avg", "exp_avg_sq"}, "others would be no moments"
                self._update(parameter, parameter.grad, state, group)
                FusedAdam.updates += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Knows no other state than its own."""
        kept = {name for state in state_dict["state"].values() for name in state}
        assert kept <= {"exp_avg", "exp_avg_sq"}, f"KeyError: {kept}"
        super().load_state_dict(state_dict)

    def _update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        assert parameter.dtype == grad.dtype == torch.float32
        (beta1, beta2), step = group["betas"], group["step"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


@contextmanager
def found_by_megatron() -> Iterator[None]:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield


def train(groups: ProcessGroups, config: RunConfig, fused: bool) -> list[tuple[float, float]]:
    if not fused:
        return train_and_not_save(groups, config)
    FusedAdam.updates = 0
    with found_by_megatron():
        steps: list[tuple[float, float]] = train_and_not_save(groups, config)
    is_adamw = config.optimizer.kind is OptimizerKind.adamw
    assert (FusedAdam.updates > 0) == (is_adamw and config.parallel.engine is EngineKind.megatron)
    return steps


ONE = ParallelConfig()
LAYOUTS = {
    "one rank, fp32": (1, ONE, Precision.fp32),
    "one rank, bf16": (1, ONE, Precision.bf16),
    "PP 2, bf16": (2, ParallelConfig(pipeline_model_parallel_size=2), Precision.bf16),
    "DP 2, distributed optimizer, bf16": (2, ParallelConfig(use_distributed_optimizer=True), Precision.bf16),
}


@pytest.mark.parametrize("kind", OptimizerKind, ids=lambda kind: kind.value)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_with_either_update(
    layout: str, kind: OptimizerKind, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    world_size, parallel, precision = LAYOUTS[layout]
    config = run_config(
        tmp_path / "run",
        text,
        parallel=parallel,
        precision=precision,
        checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=3),
    )
    config.stage = replace(config.stage, train_iters=5, micro_batch_size=2)
    config.optimizer = replace(config.optimizer, kind=kind)

    def run(fused: bool) -> list[tuple[float, float]]:
        steps = ranks.run(train, config, fused, world_size=world_size, parallel=parallel)
        assert all(each == steps[0] for each in steps)
        found: list[tuple[float, float]] = steps[0]
        return found

    tolerance = 1e-5 if precision is Precision.fp32 else 1e-2  # bf16 weights round either way
    whole: dict[bool, list[tuple[float, float]]] = {}
    for fused in (False, True):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        whole[fused] = run(fused)
        checkpoints = tmp_path / "run" / "checkpoints"
        assert len(read_metrics(tmp_path / "run")) == 5 and iteration_folder(checkpoints, 3).is_dir()
        shutil.copytree(tmp_path / "run", tmp_path / "kept")
        assert run(fused) == whole[fused][3:]
        shutil.rmtree(tmp_path / "run")
        shutil.move(tmp_path / "kept", tmp_path / "run")
        for found, expected in zip(run(not fused), whole[fused][3:], strict=True):
            assert found == pytest.approx(expected, rel=tolerance)
    for found, expected in zip(whole[True], whole[False], strict=True):
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "parallel",
    [
        case(zero(2), engine=EngineKind.deepspeed, name="ZeRO 2"),
        case(fsdp(), engine=EngineKind.fsdp, name="FSDP"),
    ],
)
def test_engines_that_shard_update_by_torch_alone(
    parallel: ParallelConfig, ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    config = run_config(
        tmp_path, text, parallel=parallel, checkpoint=checkpoint_config(hybrid_checkpoint, save_interval=9)
    )
    config.stage = replace(config.stage, train_iters=2, micro_batch_size=2)
    found = []
    for fused in (False, True):
        config.output_dir = str(tmp_path / str(fused))
        found += ranks.run(train, config, fused, world_size=2, parallel=parallel)
    assert len(found[0]) == 2 and all(steps == found[0] for steps in found)
