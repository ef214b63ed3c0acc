"""Neurons of a feed-forward as bricks of equal size: by their rows, by what works together, or at random.

MoEfication (arXiv 2110.01786) splits a feed-forward into experts of equally many neurons: by
balanced k-means on the rows of its first matrix ("parameter clustering"), by a balanced partition of the
graph of neurons that work at the same tokens ("co-activation"), or at random, for comparison.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_ROUNDS = 2
"""Of assigning and averaging; each finds the cheapest assignment of all neurons, which takes long."""


def random_bricks(channels: int, number: int, seed: int) -> Tensor:
    """[channels] int64, the brick of each; every brick has equally many."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    bricks = torch.empty(channels, dtype=torch.int64)
    bricks[order] = torch.arange(channels) // (channels // number)
    return bricks


def clustered_bricks(rows: Tensor, number: int, seed: int) -> Tensor:
    """Balanced k-means with cosine distances.

    Args:
        rows: [channels, D] what is to be alike within a brick; each is brought to length 1.
        number: of bricks, which divides the channels.
        seed: of the first centres.

    Returns:
        [channels] int64.
    """
    points = torch.nn.functional.normalize(rows.float(), dim=1)
    channels = len(points)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(channels, generator=generator)[:number]]
    bricks = torch.zeros(channels, dtype=torch.int64)
    for _ in range(_ROUNDS):
        distances = 1 - points @ centres.T
        # Each brick stands once for every neuron that it holds: the cheapest assignment is balanced.
        columns = np.repeat(distances.double().numpy(), channels // number, axis=1)
        _, chosen = linear_sum_assignment(columns)
        bricks = torch.from_numpy(chosen // (channels // number))
        sums = torch.zeros_like(centres).index_add_(0, bricks, points)
        centres = torch.nn.functional.normalize(sums, dim=1)
    return bricks


def coactive_bricks(norms: Tensor, number: int, seed: int) -> Tensor:
    """Balanced parts of the graph of co-activation.

    The weight between two neurons is how much they work at the same tokens, the product of their output norms
    summed over tokens (as in MoEfication, with norms for values). Neurons are placed by the graph's first
    eigenvectors, normalised as for spectral clustering, and those places are clustered into equal parts.

    Args:
        norms: [tokens, channels] output norms.
        number: of bricks.
        seed: of the first centres.
    """
    centred = norms.float() - norms.float().mean(0)
    graph = (centred.T @ centred).clamp_min(0)
    degree = graph.sum(1).clamp_min(1e-12).rsqrt()
    _, vectors = torch.linalg.eigh(degree.unsqueeze(1) * graph * degree.unsqueeze(0))
    return clustered_bricks(vectors[:, -number:], number, seed)
