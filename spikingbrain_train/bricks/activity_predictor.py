"""A small network that tells from a feed-forward's input which of its neurons will be active.

Deja Vu (arXiv 2310.17157) and PowerInfer (arXiv 2312.12456): two linears without biases, trained on a frozen
model's own activity as one binary classification for each neuron. Here with a ReLU between the two, as in
PowerInfer. Where neurons are cut off is chosen afterwards, so that a share of the active ones is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BATCH, _RATE, _PATIENCE = 256, 1e-3, 2
"""Tokens of a step, AdamW's learning rate, and epochs without progress on other tokens to wait for."""


class ActivityPredictor(torch.nn.Module):
    """``fc2 relu(fc1 x)``: a neuron is expected to be active where its logit is at least a cut-off.

    Args:
        inputs: width of the feed-forward's input.
        hidden: width between the two linears.
        channels: neurons of the feed-forward.
    """

    def __init__(self, inputs: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(inputs, hidden, bias=False)
        self.fc2 = torch.nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] to logits [N, channels] in float32."""
        logits: Tensor = self.fc2(F.relu(self.fc1(x.float())))
        return logits


@dataclass(frozen=True)
class Activity:
    """What a feed-forward read, and which of its neurons were active.

    Attributes:
        inputs: [N, h] in the dtype of the model.
        active: [N, F / 8 rounded up] uint8, eight neurons in a byte (:func:`packed`).
        channels: F.
    """

    inputs: Tensor
    active: Tensor
    channels: int

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, tokens: slice) -> Activity:
        return Activity(self.inputs[tokens], self.active[tokens], self.channels)


def packed(active: Tensor) -> Tensor:
    """[N, F] bool to [N, F / 8 rounded up] uint8."""
    padded = F.pad(active, (0, -active.shape[-1] % 8)).view(len(active), -1, 8)
    return (padded * _BITS.to(active.device)).sum(-1).to(torch.uint8)


def unpacked(active: Tensor, channels: int) -> Tensor:
    """The way back, [N, channels] bool."""
    bits = active.unsqueeze(-1).bitwise_and(_BITS.to(active.device))
    return bits.ne(0).flatten(1)[:, :channels]


_BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class Fitted:
    """A predictor after its training."""

    predictor: ActivityPredictor
    tokens: int
    """That it has learnt from."""
    epochs: int
    """Of the weights that it has: those that were best on the tokens kept back."""
    loss: float
    """Binary cross entropy on these, nats per neuron."""
    cutoffs: tuple[float, ...]
    """Of the logits, for each recall that was asked for."""


def fitted_predictor(
    activity: Activity,
    kept_back: Activity,
    *,
    hidden: int,
    recalls: Sequence[float],
    epochs: int,
    seed: int,
    device: torch.device,
    show: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train a predictor, until it gets no better on tokens that are kept back, and choose its cut-offs there.

    Args:
        activity: to learn from, at least one token.
        kept_back: other tokens, at least one.
        hidden: width of the predictor.
        recalls: shares of the active neurons that cut-offs are to find, each above 0 and at most 1.
        epochs: at most.
        seed: of first weights and of the order of tokens.
        device: to train on.
        show: called after every epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    predictor = ActivityPredictor(activity.inputs.shape[1], hidden, activity.channels)
    for linear in (predictor.fc1, predictor.fc2):
        bound = linear.in_features**-0.5  # torch's own, from a generator of one's own
        linear.weight.data.uniform_(-bound, bound, generator=generator)
    predictor.to(device)
    # Trained on inputs of size 1, which the first weights are made for; the scale goes into fc1 at the end.
    scale = float(activity.inputs.float().square().mean().sqrt().clamp_min(1e-12))
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=_RATE, weight_decay=0.0)
    best, best_epoch, weights = _loss(predictor, kept_back, scale, device), 0, _copy(predictor)
    for epoch in range(1, epochs + 1):
        with torch.enable_grad():  # whoever calls may be measuring
            for rows in torch.randperm(len(activity), generator=generator).split(_BATCH):
                logits = predictor(activity.inputs[rows].to(device) / scale)
                target = unpacked(activity.active[rows].to(device), activity.channels).float()
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logits, target).backward()
                optimizer.step()
        show()
        loss = _loss(predictor, kept_back, scale, device)
        if loss < best:
            best, best_epoch, weights = loss, epoch, _copy(predictor)
        elif epoch - best_epoch >= _PATIENCE:
            break
    predictor.load_state_dict(weights)
    predictor.requires_grad_(False)
    predictor.fc1.weight /= scale
    cutoffs = cutoffs_for(predictor, kept_back, recalls, device)
    return Fitted(predictor, len(activity), best_epoch, best, cutoffs)


def cutoffs_for(
    predictor: ActivityPredictor, activity: Activity, recalls: Sequence[float], device: torch.device
) -> tuple[float, ...]:
    """The highest cut-offs that find these shares of the active neurons; minus infinity where none is."""
    found = [
        predictor(part.inputs.to(device))[unpacked(part.active.to(device), part.channels)].cpu()
        for part in _batches(activity)
    ]
    logits = torch.cat(found).sort(descending=True).values
    if not len(logits):
        return tuple(-torch.inf for _ in recalls)
    return tuple(float(logits[min(len(logits), -int(-recall * len(logits) // 1)) - 1]) for recall in recalls)


@torch.no_grad()
def _loss(predictor: ActivityPredictor, activity: Activity, scale: float, device: torch.device) -> float:
    total = 0.0
    for part in _batches(activity):
        target = unpacked(part.active.to(device), part.channels).float()
        logits = predictor(part.inputs.to(device) / scale)
        total += float(F.binary_cross_entropy_with_logits(logits, target, reduction="sum").double())
    return total / (len(activity) * activity.channels)


def _batches(activity: Activity) -> list[Activity]:
    return [activity[slice(first, first + _BATCH)] for first in range(0, len(activity), _BATCH)]


def _copy(predictor: ActivityPredictor) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in predictor.state_dict().items()}
