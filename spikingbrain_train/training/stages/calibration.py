"""The output projection of a freshly swapped mixer, fitted in closed form.

It was made for another attention's output. It is fitted again, by least squares on a few thousand tokens,
pulled towards the source's projection so that rarely seen directions keep their meaning.

This project's own (docs/recipe.md), not a part of SpikingBrain's report.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.parallel.process_groups import ProcessGroups


class ProjectionFit:
    """Ridge regression of an output projection: ``min |Y W^T - A|^2 + r |W - s W0|^2``.

    Y is what the projection reads, A what it should give, W0 the source's projection and s the factor that
    suits W0 best. r is ``ridge`` times the mean squared feature summed over tokens.

    Args:
        linear: the row-parallel projection, which reads this tensor-parallel rank's part of the features;
            its weight is replaced by :meth:`solve`.
        groups: process groups; features are gathered over tensor-parallel ranks, sums reduced over data-
            and context-parallel ones.
        sequence_parallel: whether targets are this rank's share of the sequence.
    """

    def __init__(self, linear: Any, groups: ProcessGroups, *, sequence_parallel: bool) -> None:
        self.linear = linear
        self.groups = groups
        self.sequence_parallel = sequence_parallel
        width, features = linear.weight.shape
        features *= groups.collection.tp.size()
        device = linear.weight.device
        self.gram = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.cross = torch.zeros(features, width, dtype=torch.float32, device=device)
        self.power = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, features: Tensor, target: Tensor, rows: Tensor | None = None) -> None:
        """Take one micro-batch into the sums.

        Args:
            features: [T, B, features of this tensor-parallel rank] over the whole slice.
            target: [T, B, hidden_size], this rank's share of the sequence under sequence parallelism.
            rows: [T, B] bool: which of them count; None for all.
        """
        tp_group = self.groups.collection.tp
        y = gather_from_tensor_model_parallel_region(features, group=tp_group)
        if self.sequence_parallel:
            target = gather_from_sequence_parallel_region(target, group=tp_group)
        y, target = (x.flatten(0, 1) if rows is None else x[rows] for x in (y, target))
        y, target = y.float(), target.float()
        bias = getattr(self.linear, "bias", None)
        if bias is not None and bias.numel():  # which stays; Transformer Engine has an empty one
            target = target - bias.float()
        self.gram.addmm_(y.t(), y)
        self.cross.addmm_(y.t(), target)
        self.power += target.square().sum(dtype=torch.float64)

    @torch.no_grad()
    def solve(self, ridge: float, setting: str, *, source_scale: float | None = None) -> float:
        """Replace the projection by the fitted one; every rank solves the same system, keeps its columns.

        Args:
            ridge: pull towards the source's projection.
            setting: that it is from, for the sentence.
            source_scale: s above; None takes the one that suits best.

        Returns:
            The squared error that is left on the tokens of the fit, relative to the target's square.

        Raises:
            ConfigurationError: the system has no single solution.
        """
        for sums in (self.gram, self.cross, self.power):
            torch.distributed.all_reduce(sums, group=self.groups.collection.dp_cp)
        tp_group = self.groups.collection.tp
        local = self.linear.weight
        source = gather_from_tensor_model_parallel_region(local.float(), group=tp_group).double()
        gram, cross = self.gram.double(), self.cross.double()
        scale = source_scale or (source.t() * cross).sum() / (source @ gram * source).sum()
        pull = ridge * gram.diagonal().mean()
        pulled = gram.clone()
        pulled.diagonal().add_(pull)
        try:
            fitted = torch.linalg.solve(pulled, cross + pull * scale * source.t()).t()
        except torch.linalg.LinAlgError as error:
            raise ConfigurationError(
                f"{setting}={ridge} is too small, so that the fit has no single solution; raise it, e.g. to "
                "0.3, or raise stage.alignment.calibration_tokens"
            ) from error
        local.copy_(fitted.chunk(tp_group.size(), dim=1)[tp_group.rank()])
        explained = 2 * (fitted.t() * cross).sum() - (fitted @ gram * fitted).sum()
        return float(1 - explained / self.power)
