"""A mixture-of-experts layer against plain loops over its tokens and experts.

Tolerance 1e-5 of the largest entry, in float32: both sum at most 48 tokens and 16 channels, in other orders
(errors of about 1e-6 are seen).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.models.moe.small_layer import build_layer, gradients, inputs, loops_over_tokens_and_experts

CASES = {
    "top-1 and a shared expert": MoEConfig(router_topk=1),
    "top-2 and two shared experts": MoEConfig(router_topk=2, num_shared_experts=2),
    "top-2, no shared expert, strong losses": MoEConfig(
        router_topk=2, num_shared_experts=0, aux_loss_coeff=0.7, z_loss_coeff=0.3
    ),
    "top-2 by a router with a hidden layer": MoEConfig(router_topk=2, router_hidden_size=6, z_loss_coeff=0.3),
    "top-2 by a router with biases": MoEConfig(router_topk=2, router_bias=True, z_loss_coeff=0.3),
    "top-1, dropping": MoEConfig(capacity_factor=0.75),
    "top-2, dropping": MoEConfig(router_topk=2, capacity_factor=0.6, num_shared_experts=0),
    "top-1, dropping and padding": MoEConfig(capacity_factor=0.75, pad_to_capacity=True),
    "top-2, roomy and padded": MoEConfig(router_topk=2, capacity_factor=1.6, pad_to_capacity=True),
}


def _errors(groups: ProcessGroups, moe: MoEConfig) -> tuple[dict[str, float], float]:
    layer = build_layer(groups, moe, ParallelConfig())
    if moe.router_bias:
        layer.router.bias.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    hidden, direction = inputs()
    output, grads = gradients(layer, hidden, direction)
    expected_output, expected = loops_over_tokens_and_experts(layer, moe, hidden, direction)
    assert grads.keys() == expected.keys()
    errors = {"output": _relative(output, expected_output)}
    for name, grad in expected.items():
        # An expert without tokens has no gradient in the loops and zeros in the layer.
        grad = torch.zeros_like(grads[name]) if grad is None else grad
        errors[name] = _relative(grads[name], grad)
    return errors, layer.router.statistics_sums[layer.router.num_experts].item()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_those_of_plain_loops(case: str, ranks: RankPool) -> None:
    moe = replace(CASES[case])
    [(errors, dropped)] = ranks.run(_errors, moe, world_size=1, parallel=ParallelConfig())

    assert max(errors.values()) <= 1e-5, errors
    assert (dropped > 0) == (moe.capacity_factor is not None and moe.capacity_factor < 1)


def _zero_router(groups: ProcessGroups) -> tuple[torch.Tensor, torch.Tensor, float]:
    moe = MoEConfig(router_topk=2, num_shared_experts=0)
    layer = build_layer(groups, moe, ParallelConfig())
    with torch.no_grad():
        layer.router.weight.zero_()
        probs, _ = layer.router(inputs()[0])
    return probs.sum(1), probs.amax(1), layer.router.weight.is_new_parameter


def test_a_zero_router_weighs_every_expert_that_is_visited_with_one_over_their_number(
    ranks: RankPool,
) -> None:
    [(total, largest, is_new)] = ranks.run(_zero_router, world_size=1, parallel=ParallelConfig())
    torch.testing.assert_close(largest, torch.full_like(largest, 1 / 4))
    torch.testing.assert_close(total, torch.full_like(total, 2 / 4))
    assert is_new


def _bfloat16_router(groups: ProcessGroups) -> tuple[torch.dtype, torch.dtype, torch.dtype, float]:
    layer = build_layer(groups, MoEConfig(), ParallelConfig())
    hidden = inputs()[0].bfloat16().requires_grad_()
    layer.router.weight.data = layer.router.weight.data.bfloat16()
    logits = layer.router.gating(hidden)
    logits.square().sum().backward()
    exact = hidden.detach().double() @ layer.router.weight.detach().double().t()
    return logits.dtype, hidden.grad.dtype, layer.router.weight.grad.dtype, _relative(logits.double(), exact)


def test_the_router_computes_in_float32_whatever_comes_in(ranks: RankPool) -> None:
    [(logits, hidden_grad, weight_grad, error)] = ranks.run(
        _bfloat16_router, world_size=1, parallel=ParallelConfig()
    )
    assert (logits, hidden_grad, weight_grad) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert error < 1e-6  # bfloat16 arithmetic would leave 1e-3


def _statistics(groups: ProcessGroups) -> tuple[list[float], list[float], list[float]]:
    layer = build_layer(groups, MoEConfig(router_topk=2), ParallelConfig())
    hidden, direction = inputs()
    gradients(layer, hidden, direction)
    once = layer.router.statistics_sums.tolist()
    layer.eval()
    layer(hidden)
    layer.train()
    with torch.no_grad():
        layer(hidden)
    silent = layer.router.statistics_sums.tolist()
    layer.router.reset_statistics()
    return once, silent, layer.router.statistics_sums.tolist()


def test_only_training_passes_with_gradients_are_counted(ranks: RankPool) -> None:
    [(once, silent, after_reset)] = ranks.run(_statistics, world_size=1, parallel=ParallelConfig())
    *assignments, dropped, tokens, _, _ = once
    assert tokens == 48 and sum(assignments) == 96 and dropped == 0
    assert silent == once
    assert after_reset == [0.0] * len(once)
