"""Which bricks a token is sent to: by what they would give, by centres, or by a router that was fitted.

MoEfication (arXiv 2110.01786): ground truth, similarity to the centre of an expert's rows, and a
router trained to predict the ground truth, a linear one in closed form here and one with a hidden layer in
:mod:`.trained_router`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.bricks.neuron_model import FeedForward, NeuronModel

_RIDGE = 0.1
"""Of the fit, times the mean square of an input channel."""


@dataclass(frozen=True)
class Router:
    """Logits ``W x``, or ``W tanh(H x)``, of which the largest are chosen.

    Attributes:
        weight: [number, h], or [number, r] behind a hidden layer.
        hidden: [r, h].
    """

    weight: Tensor
    hidden: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """[N, number] of inputs [N, h]."""
        if self.hidden is not None:
            x = torch.tanh(x @ self.hidden.to(x.device).T)
        return x @ self.weight.to(x.device).T


def brick_norms(norms: Tensor, bricks: Tensor, number: int) -> Tensor:
    """What each brick gives at each token, the ground truth of routing.

    Args:
        norms: [..., F] output norms of neurons.
        bricks: [F] int64, the brick of each.
        number: of bricks.

    Returns:
        [..., number]: root of the sum of squares of a brick's neurons.
    """
    squares = norms.new_zeros(*norms.shape[:-1], number)
    return squares.index_add_(-1, bricks.to(norms.device), norms.square()).sqrt()


def centre_router(gate: Tensor, bricks: Tensor, number: int) -> Router:
    """Mean of each brick's rows of the gate projection [F, h]."""
    sums = torch.zeros(number, gate.shape[1]).index_add_(0, bricks, gate.float())
    return Router(sums / (len(bricks) // number))


def random_router(hidden_size: int, number: int, seed: int) -> Router:
    """One that knows nothing, for comparison: normal numbers."""
    return Router(torch.randn(number, hidden_size, generator=torch.Generator().manual_seed(seed)))


def fitted_router(inputs: Tensor, norms: Tensor, bricks: Tensor, number: int) -> Router:
    """Linear of the input that predicts which bricks give most, by ridge regression in closed form.

    What is predicted is a brick's share of what all bricks give at the token; of that only the order counts.

    Args:
        inputs: [N, h] of the feed-forward.
        norms: [N, F] output norms.
        bricks: [F] int64.
        number: of bricks.
    """
    x = inputs.double()
    given = brick_norms(norms.double(), bricks, number)
    shares = given / given.sum(-1, keepdim=True).clamp_min(1e-30) * number - 1
    products = x.T @ x
    ridge = _RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
    return Router(torch.linalg.solve(products + ridge, x.T @ shares).T.float().contiguous())


class Recording:
    """Inputs and output norms of every feed-forward, while a model reads text.

    Attributes:
        inputs: layer -> parts of [N, h].
        norms: layer -> parts of [N, F].
    """

    def __init__(self, model: NeuronModel) -> None:
        self._model, self._stack = model, ExitStack()
        self.inputs: dict[int, list[Tensor]] = {}
        self.norms: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Recording:
        self._stack.enter_context(watched_inputs(self._model, self.inputs, keep=True))
        self._stack.enter_context(self._model.changed(self._watch))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch(self, feed_forward: FeedForward, inside: Tensor) -> None:
        norms = feed_forward.output_norms(inside).reshape(-1, inside.shape[-1])
        self.norms.setdefault(feed_forward.part.layer, []).append(norms.cpu())


def watched_inputs(model: NeuronModel, inputs: dict[int, list[Tensor]], *, keep: bool) -> ExitStack:
    """Put what every feed-forward reads into ``inputs``, by layer, while the context lasts.

    Args:
        model: of dense feed-forwards.
        inputs: gets [N, h], as they come (``keep``) or the last alone.
        keep: whether earlier ones stay; they are moved to the CPU then.
    """

    def hook(layer: int) -> Any:
        def look(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            if keep:
                inputs.setdefault(layer, []).append(x.cpu())
            else:
                inputs[layer] = [x]

        return look

    stack = ExitStack()
    for each in model.feed_forwards:
        assert each.into is not None
        stack.callback(each.into.register_forward_pre_hook(hook(each.part.layer)).remove)
    return stack


class Routed:
    """Lets every token use k bricks of each feed-forward; the other neurons are left out.

    Args:
        model: of dense feed-forwards.
        bricks: layer -> [F] int64.
        number: of bricks.
        topk: bricks of a token.
        routers: by layer; None routes by what bricks would give (oracle).
    """

    def __init__(
        self,
        model: NeuronModel,
        bricks: Mapping[int, Tensor],
        number: int,
        topk: int,
        routers: Mapping[int, Router] | None,
    ) -> None:
        self._model, self._bricks, self._number, self._topk = model, bricks, number, topk
        self._routers, self._stack = routers, ExitStack()
        self._inputs: dict[int, list[Tensor]] = {}

    def __enter__(self) -> None:
        if self._routers is not None:
            self._stack.enter_context(watched_inputs(self._model, self._inputs, keep=False))
        self._stack.enter_context(self._model.changed(self._route))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _route(self, feed_forward: FeedForward, inside: Tensor) -> Tensor:
        layer = feed_forward.part.layer
        bricks = self._bricks[layer].to(inside.device)
        if self._routers is None:
            norms = feed_forward.output_norms(inside).reshape(-1, inside.shape[-1])
            scores = brick_norms(norms, bricks, self._number)
        else:
            scores = self._routers[layer].scores(self._inputs[layer][0])
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(-1, scores.topk(self._topk, dim=-1).indices, True)
        return inside.masked_fill(~chosen[:, bricks].view_as(inside), 0)
