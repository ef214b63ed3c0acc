"""The L1 loss inside a feed-forward against the same loss written out, in float64.

Tolerance 1e-12: rounding of sums of a few hundred numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import Precision
from spikingbrain_train.models.feed_forwards.gated_activation import GatedActivation
from spikingbrain_train.models.feed_forwards.routing import HasAuxiliaryLoss
from spikingbrain_train.models.transformer_config import transformer_config
from spikingbrain_train.ops.gated_activation import naive_gated_relu
from tests.distributed.small_runs import MODEL

TOLERANCE = 1e-12
WIDTH, FACTOR = 12, 3.0


def activation(func: ActivationFunc = ActivationFunc.relu, threshold: float = 0.4) -> GatedActivation:
    model = replace(MODEL, activation_func=func, fatrelu_threshold=threshold)
    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    return GatedActivation(config, channels=WIDTH)


def inputs(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, 2 * WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("func", [ActivationFunc.relu, ActivationFunc.fatrelu])
def test_loss_and_gradient_are_those_of_the_loss_written_out(
    func: ActivationFunc, scale: float | None
) -> None:
    module, ours, theirs = activation(func), inputs(), inputs()
    module.l1_factor = FACTOR
    if scale is not None:
        module.scale_auxiliary_loss(torch.tensor(scale, dtype=torch.float64))
    behind = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    (module(ours) * behind).sum().backward()
    product = naive_gated_relu(theirs, 0.4 if func is ActivationFunc.fatrelu else 0.0)
    l1 = (1.0 if scale is None else scale) * FACTOR * product.abs().mean(-1).sum()
    ((product * behind).sum() + l1).backward()
    assert isinstance(module, HasAuxiliaryLoss)
    assert module.auxiliary_loss().item() == pytest.approx(l1.item(), rel=TOLERANCE)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=TOLERANCE)
    alone = inputs()
    (naive_gated_relu(alone) * behind).sum().backward()
    assert alone.grad is not None and not torch.allclose(ours.grad, alone.grad)


def test_what_is_computed_again_counts_once() -> None:
    module, again = activation(), activation()
    for each in (module, again):
        each.l1_factor = FACTOR
        each.reset(is_counting=True)
    x, y = inputs(), inputs()
    module(x).sum().backward()
    # As megatron-core does, and our router expects: the first time without gradients.
    checkpoint(again, y, use_reentrant=True).sum().backward()
    assert again.auxiliary_loss() == module.auxiliary_loss() > 0
    assert torch.equal(again.counts, module.counts) and torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_zeros_are_counted_in_steps_that_are_reported_alone() -> None:
    module, x = activation(), inputs()
    module(x)
    assert module.counts.tolist() == [0, 0] and module.auxiliary_loss() == 0
    module.reset(is_counting=True)
    product = module(x)
    module(inputs(1))
    both = torch.cat([product, module(inputs(1)).detach()])
    zeros = 2 * (both == 0).sum().item() - (product == 0).sum().item()
    assert module.counts.tolist() == [zeros, 3 * product.numel() - zeros] and zeros > 0
    module.eval()
    module(x)
    module.train()
    with torch.no_grad():
        module(x)
    assert module.counts.sum() == 3 * product.numel()
    module.reset(is_counting=False)
    assert module.counts.tolist() == [0, 0]
