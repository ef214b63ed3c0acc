"""Muon updates matrices of hidden layers as torch's Muon does, and AdamW the rest as torch's AdamW does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import (
    GatedDeltaRuleConfig,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
)
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig
from spikingbrain_train.config.run import OptimizerConfig, OptimizerKind, Precision, RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.checks import check_matrices_train
from spikingbrain_train.planning.planner import plan_run
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, run_config, write_text

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

STEPS = 3
SETTINGS = OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2, muon_precision=Precision.bf16, clip_grad=0.0)
MAMBA = replace(MODEL, mixers=["mamba"], mamba=MambaConfig(intermediate_size=32, state_size=4, use_bias=True))
DELTA = replace(MODEL, mixers=["gdn"], gdn=GatedDeltaRuleConfig(short_convolution=4, output_gate=True))
FULL_GATE = replace(MODEL, gla=GatedLinearAttentionConfig(gate=GateKind.full_rank, output_gate=True))
SHARED = replace(MODEL_76B, moe=MoEConfig(num_experts=4, router_topk=1, num_shared_experts=2))

Updates = dict[str, tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, bool]]
"""Name -> parameter before, gradients, parameter behind, and whether it decays."""


def _trained(groups: ProcessGroups, model: ModelConfig, settings: OptimizerConfig) -> Updates:
    """Some steps of random gradients."""
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config
    from spikingbrain_train.training.build import wrap_data_parallel
    from spikingbrain_train.training.optimizer import build_optimizer, update_weights

    parallel = ParallelConfig()
    config = transformer_config(model, parallel, Precision.fp32, on_cpu=True)
    built = build_model(model, config, resolve_kernels(KernelConfig(), groups.accelerator), groups.device)
    wrapped = wrap_data_parallel(built, parallel)
    optimizer = build_optimizer(settings, parallel, Precision.fp32, wrapped)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = settings.lr, settings.weight_decay * group["wd_mult"]
    decays = {id(p): group["wd_mult"] > 0 for group in optimizer.param_groups for p in group["params"]}
    named = dict(built.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        for name, parameter in named.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(gradient)
            gradients[name].append(gradient)
        update_weights(optimizer, lambda norm: None)
    return {
        name: (before[name], gradients[name], parameter.detach(), decays[id(parameter)])
        for name, parameter in named.items()
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of an indexed dataset."""
    return write_text(tmp_path_factory.mktemp("text"))


def _rows_of_matrices(name: str, rows: int, model: ModelConfig) -> list[list[int]]:
    """Which rows of a fused parameter are one matrix, said a second time: by hand."""
    width = model.kv_channels
    if name.endswith("linear_qkv.weight"):
        groups = rows // ((model.num_attention_heads // model.num_query_groups + 2) * width)
        block = rows // groups
        kinds: list[list[int]] = [[], [], []]
        for row in range(rows):
            head = row % block // width
            kinds[max(0, head - (block // width - 3))].append(row)
        return kinds
    if name.endswith("linear_fc1.weight"):
        return [list(range(rows // 2)), list(range(rows // 2, rows))]
    if name.endswith("in_proj.weight"):
        return [list(range(0, rows, 2)), list(range(1, rows, 2))]
    return [list(range(rows))]


MATRICES = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
CASES = {
    "hybrid": (MODEL, MATRICES | {"linear_gate_down_proj", "linear_gate_up_proj"}),
    "full gate, output gate": (FULL_GATE, MATRICES | {"linear_gate_proj", "linear_output_gate"}),
    "experts": (SHARED, MATRICES),
    "delta rule": (DELTA, MATRICES | {"linear_decay", "linear_beta", "linear_output_gate"}),
    "Mamba": (MAMBA, {"in_proj", "out_proj", "linear_fc1", "linear_fc2"}),
}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("case", CASES)
def test_each_matrix_is_updated_as_by_torchs_muon_and_all_else_as_by_its_adamw(
    case: str, ranks: RankPool
) -> None:
    """Tolerance 1e-6: both multiply bf16 by the same products, and differ in how they scale the result."""
    model, names = CASES[case]
    (found,) = ranks.run(_trained, model, SETTINGS, world_size=1, parallel=ParallelConfig())
    by_muon = set()
    for name, (before, gradients, behind, decays) in found.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        is_matrix = name.endswith(".weight") and kind in names and "layers." in name
        if is_matrix:
            by_muon.add(kind)
            expected = _muon(before, gradients, _rows_of_matrices(name, len(before), model))
        else:
            decay = SETTINGS.weight_decay if decays else 0.0
            expected = _adamw(before, gradients, decay)
        assert torch.allclose(behind, expected, rtol=1e-6, atol=1e-6), name
    assert by_muon == names


def _muon(before: torch.Tensor, gradients: Iterable[torch.Tensor], matrices: list[list[int]]) -> torch.Tensor:
    behind = before.clone()
    for rows in matrices:
        matrix = torch.nn.Parameter(before[rows])
        optimizer: Any = torch.optim.Muon(
            [matrix], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        for gradient in gradients:
            matrix.grad = gradient[rows]
            optimizer.step()
        behind[rows] = matrix.detach()
    return behind


def _adamw(before: torch.Tensor, gradients: Iterable[torch.Tensor], decay: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(before.clone())
    betas = (SETTINGS.adam_beta1, SETTINGS.adam_beta2)
    optimizer = torch.optim.AdamW(
        [parameter], lr=SETTINGS.lr, betas=betas, eps=SETTINGS.adam_eps, weight_decay=decay
    )
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def test_updates_of_matrices_have_the_size_of_adamws(ranks: RankPool) -> None:
    """Liu et al., arXiv 2502.16982, section 2.2: 0.2, within what Newton-Schulz leaves."""
    settings = replace(SETTINGS, weight_decay=0.0, muon_precision=Precision.fp32)
    (found,) = ranks.run(_trained, MODEL, settings, world_size=1, parallel=ParallelConfig())
    before, _, behind, _ = found["decoder.layers.1.mlp.linear_fc2.weight"]
    rms = (behind - before).square().mean().sqrt().item()
    assert 0.1 * STEPS**0.5 < rms / (0.2 * SETTINGS.lr) < 1.25 * STEPS


def _state_bytes(groups: ProcessGroups, config: RunConfig) -> int:
    """Bytes of what the optimizer of a run keeps, but for steps."""
    from spikingbrain_train.checkpoint.optimizer_state import chain_of
    from spikingbrain_train.training.trainer import Trainer

    optimizer = Trainer(config, groups).state.optimizer
    return sum(
        tensor.numel() * tensor.element_size()
        for part in chain_of(optimizer)
        for state in part.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )


@pytest.mark.parametrize(
    "model", [MODEL, SHARED, MAMBA, DELTA], ids=["hybrid", "experts", "Mamba", "delta rule"]
)
def test_a_plan_knows_what_the_state_takes(
    model: ModelConfig, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """But for the vocabulary's padding, to the byte."""
    config = run_config(tmp_path, text, model=model, optimizer=SETTINGS)
    (found,) = ranks.run(_state_bytes, config, world_size=1, parallel=ParallelConfig())
    (stage,) = plan_run(config, 1).stages
    assert found == stage.memory.optimizer


def test_adapters_leave_it_nothing_to_update() -> None:
    config = to_run_config(
        compose_run(["model=tiny_hybrid", "optimizer=muon_cosine", "model.lora.names=[a]", "dry_run=true"])
    )
    with pytest.raises(
        ConfigurationError, match="weights of model.lora train alone; set optimizer.kind=adamw"
    ):
        check_matrices_train(config)
