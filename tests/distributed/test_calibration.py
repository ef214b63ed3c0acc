"""What an alignment stage sets in closed form, against the same formulas written out on whole tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spikingbrain_train.config.model import FeatureMap, GatedLinearAttentionConfig, GateKind
from spikingbrain_train.config.parallel import (
    KernelConfig,
    LinearAttentionBackend,
    ParallelConfig,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.config.run import Precision
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL

KERNELS = KernelConfig(
    gated_linear_attention=LinearAttentionBackend.chunk,
    softmax_attention=SoftmaxAttentionBackend.blocked,
    parallel_linear=ParallelLinearBackend.megatron,
)


def gla_mixer(
    groups: ProcessGroups,
    parallel: ParallelConfig,
    qk_layernorm: bool,
    gla: GatedLinearAttentionConfig = MODEL.gla,
):
    """The only layer of a one-layer GLA model; its weights do not depend on the topology."""
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.transformer_config import transformer_config

    model = replace(MODEL, num_layers=1, mixers=["gla"], qk_layernorm=qk_layernorm, gla=gla)
    config = transformer_config(model, parallel, Precision.fp32, on_cpu=True)
    torch.manual_seed(0)
    return build_model(model, config, KERNELS, groups.device).decoder.layers[0].self_attention


def _balanced_keys(
    groups: ProcessGroups, qk_layernorm: bool, gla: GatedLinearAttentionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mixer = gla_mixer(groups, ParallelConfig(), qk_layernorm, gla)
    torch.nn.init.normal_(mixer.linear_qkv.bias)
    hidden = torch.randn(5, 2, MODEL.hidden_size)
    before = mixer.get_query_key_value_tensors(hidden)
    mixer.balance_keys()
    after = mixer.get_query_key_value_tensors(hidden)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    return before[1].detach(), after[1].detach(), mixer.linear_gate_up_proj.bias.detach()


WHERE_KEYS_ARE_SCALED = {
    "key rows": (False, MODEL.gla),
    "key norm of the source": (True, MODEL.gla),
    "key norm": (False, replace(MODEL.gla, qk_norm=True)),
    "key rows of groups of their own": (False, replace(MODEL.gla, num_query_groups=4)),
    "key rows, rotary positions": (False, replace(MODEL.gla, rotary=True)),
}


@pytest.mark.parametrize(("qk_layernorm", "gla"), WHERE_KEYS_ARE_SCALED.values(), ids=WHERE_KEYS_ARE_SCALED)
def test_keys_are_scaled_by_what_one_step_adds_to_a_moving_average(
    qk_layernorm: bool, gla: GatedLinearAttentionConfig, ranks: RankPool
) -> None:
    ((before, after, bias),) = ranks.run(
        _balanced_keys, qk_layernorm, gla, world_size=1, parallel=ParallelConfig()
    )

    decay = torch.sigmoid(bias.double()) ** (1 / MODEL.gla.gate_logit_normalizer)
    share = (1 - decay).view(-1, MODEL.kv_channels)
    expected = before.double() * share / share.max()
    assert torch.allclose(after.double(), expected, rtol=1e-5)  # float32 weights


def _changed_by_balancing(groups: ProcessGroups, gate: GateKind) -> bool:
    gla = GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=gate)
    mixer = gla_mixer(groups, ParallelConfig(), qk_layernorm=False, gla=gla)
    before = mixer.linear_qkv.weight.detach().clone()
    mixer.balance_keys()
    return not torch.equal(before, mixer.linear_qkv.weight)


@pytest.mark.parametrize("gate", GateKind)
def test_keys_of_sigmoid_features_are_left_alone(gate: GateKind, ranks: RankPool) -> None:
    assert ranks.run(_changed_by_balancing, gate, world_size=1, parallel=ParallelConfig()) == [False]


def _fitted_projection(groups: ProcessGroups, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    from megatron.core.tensor_parallel.mappings import (
        gather_from_tensor_model_parallel_region,
        scatter_to_sequence_parallel_region,
    )

    from spikingbrain_train.training.stages.calibration import ProjectionFit

    mixer = gla_mixer(groups, parallel, qk_layernorm=False)
    tp_group = groups.collection.tp

    def whole(x: torch.Tensor) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(x.detach(), group=tp_group).clone()

    def share(x: torch.Tensor) -> torch.Tensor:
        return scatter_to_sequence_parallel_region(x, group=tp_group) if parallel.sequence_parallel else x

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(24, 2, MODEL.hidden_size, generator=generator)
    target = torch.randn(24, 2, MODEL.hidden_size, generator=generator)
    result = {"source": whole(mixer.linear_proj.weight), "features": whole(mixer.normed_heads(share(hidden)))}
    fit = ProjectionFit(mixer.linear_proj, groups, sequence_parallel=parallel.sequence_parallel)
    fit.add(mixer.normed_heads(share(hidden)), share(target))
    result["error"] = torch.tensor(fit.solve(0.3, "ridge"))
    return result | {"target": target, "fitted": whole(mixer.linear_proj.weight)}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(tensor_model_parallel_size=2)),
        (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    ],
    ids=["one rank", "TP 2", "TP 2 + sequence parallel"],
)
def test_the_projection_solves_the_ridge_regression(
    world_size: int, parallel: ParallelConfig, ranks: RankPool
) -> None:
    result, *others = ranks.run(_fitted_projection, parallel, world_size=world_size, parallel=parallel)

    y, target = (result[name].double().flatten(0, 1) for name in ("features", "target"))
    source = result["source"].double()
    scale = ((y @ source.T) * target).sum() / (y @ source.T).square().sum()
    # The normal equations of the augmented system: rows of sqrt(r) I pull towards the scaled source.
    pull = (0.3 * y.square().sum(0).mean()).sqrt() * torch.eye(y.shape[1], dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([y, pull]), torch.cat([target, pull @ (scale * source.T)])
    ).solution.T
    # Sums over 48 tokens in float32.
    assert torch.allclose(result["fitted"].double(), expected, rtol=1e-4, atol=1e-5)
    left = (y @ expected.T - target).square().sum() / target.square().sum()
    assert result["error"].item() == pytest.approx(left.item(), rel=1e-5)
    for other in others:
        assert torch.equal(other["fitted"], result["fitted"])
