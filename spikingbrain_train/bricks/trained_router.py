"""A router with a hidden layer, trained to say which bricks give most (MoEfication, arXiv 2110.01786)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from spikingbrain_train.bricks.routers import Router, brick_norms

_BATCH, _EPOCHS, _PATIENCE = 128, 40, 4
"""Passes over the tokens end when so many did not make the loss on those held out smaller."""
_HELD_OUT = 8
"""One token of so many is held out."""
_LR, _WEIGHT_DECAY = 1e-3, 0.1


def trained_router(
    inputs: Tensor, norms: Tensor, bricks: Tensor, number: int, hidden_size: int, seed: int
) -> Router:
    """Two matrices with a tanh between them, trained by AdamW.

    Targets are what each brick gives at a token over what the largest gives, for the binary cross entropy of
    every brick by itself. The weights are those with the smallest loss on tokens that are held out.

    Args:
        inputs: [N, h] of the feed-forward.
        norms: [N, F] output norms.
        bricks: [F] int64, the brick of each neuron.
        number: of bricks.
        hidden_size: channels of the hidden layer.
        seed: of first weights and of the order of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    x, given = inputs.float(), brick_norms(norms.float(), bricks, number)
    targets = given / given.amax(-1, keepdim=True).clamp_min(1e-30)
    held_out = torch.arange(len(x)) % _HELD_OUT == _HELD_OUT - 1
    # Sums in front of the tanh begin at the order of 1, and logits small.
    scale = (x.square().mean().sqrt() * x.shape[1] ** 0.5).clamp_min(1e-30)
    hidden = torch.randn(hidden_size, x.shape[1], generator=generator) / scale
    weight = 0.1 * torch.randn(number, hidden_size, generator=generator) / hidden_size**0.5
    parameters = [hidden.requires_grad_(), weight.requires_grad_()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, weight_decay=_WEIGHT_DECAY)
    best, since, kept = float("inf"), 0, (hidden.detach().clone(), weight.detach().clone())
    train_x, train_y = x[~held_out], targets[~held_out]
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(train_x), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            logits = torch.tanh(train_x[batch] @ hidden.T) @ weight.T
            binary_cross_entropy_with_logits(logits, train_y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            logits = torch.tanh(x[held_out] @ hidden.T) @ weight.T
            loss = float(binary_cross_entropy_with_logits(logits, targets[held_out]))
        since += 1
        if loss < best:
            best, since, kept = loss, 0, (hidden.detach().clone(), weight.detach().clone())
        if since == _PATIENCE:
            break
    return Router(weight=kept[1], hidden=kept[0])
