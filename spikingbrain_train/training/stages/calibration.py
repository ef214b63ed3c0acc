"""The output projection of a freshly swapped mixer, fitted in closed form.

It was made for another attention's output. It is fitted again, by least squares on a few thousand tokens,
pulled towards the source's projection so that rarely seen directions keep their meaning.

This project's own (docs/recipe.md), not a part of SpikingBrain's report.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.mixers.alignable import HasNormedHeads
from spikingbrain_train.parallel.process_groups import ProcessGroups


class ProjectionFit:
    """Ridge regression of one layer's output projection: ``min |Y W^T - A|^2 + r |W - s W0|^2``.

    Y are the layer's normalised heads, A the dense layer's outputs on the same inputs, W0 the source's
    projection and s the factor that suits W0 best. r is ``ridge`` times the mean squared feature summed over
    tokens.

    Args:
        mixer: the layer; its ``linear_proj`` is replaced by :meth:`solve`.
        groups: process groups; features are gathered over tensor-parallel ranks, sums reduced over data-
            and context-parallel ones.
    """

    def __init__(self, mixer: HasNormedHeads, groups: ProcessGroups) -> None:
        self.mixer = mixer
        self.groups = groups
        features = mixer.query_projection_size
        device = mixer.linear_proj.weight.device
        self.gram = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.cross = torch.zeros(features, mixer.config.hidden_size, dtype=torch.float32, device=device)
        self.power = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        hidden_states: Tensor,
        target: Tensor,
        layout: SequenceLayout | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Take one micro-batch into the sums.

        Args:
            hidden_states: [T, B, hidden_size] normed input of the layer (this rank's share under sequence
                parallelism).
            target: output of the dense layer, shaped like ``hidden_states``.
            layout: how the sequences lie on context-parallel ranks, and their documents.
            weight: [T, B] float32 of each token's squared error, shaped like ``hidden_states``; None is 1.
        """
        tp_group = self.groups.collection.tp
        heads = self.mixer.normed_heads(hidden_states, layout)
        y = gather_from_tensor_model_parallel_region(heads, group=tp_group)
        if self.mixer.config.sequence_parallel:
            target = gather_from_sequence_parallel_region(target, group=tp_group)
            if weight is not None:
                weight = gather_from_sequence_parallel_region(weight, group=tp_group)
        y, target = y.flatten(0, 1).float(), target.flatten(0, 1).float()
        if weight is not None:
            root = weight.sqrt().flatten().unsqueeze(1)
            y, target = y * root, target * root
        self.gram.addmm_(y.t(), y)
        self.cross.addmm_(y.t(), target)
        self.power += target.square().sum(dtype=torch.float64)

    @torch.no_grad()
    def solve(self, ridge: float) -> float:
        """Replace the projection by the fitted one; every rank solves the same system, keeps its columns.

        Returns:
            The squared error that is left on the tokens of the fit, relative to the target's square.

        Raises:
            ConfigurationError: the system has no single solution.
        """
        for sums in (self.gram, self.cross, self.power):
            torch.distributed.all_reduce(sums, group=self.groups.collection.dp_cp)
        tp_group = self.groups.collection.tp
        local = self.mixer.linear_proj.weight
        source = gather_from_tensor_model_parallel_region(local.float(), group=tp_group).double()
        gram, cross = self.gram.double(), self.cross.double()
        scale = (source.t() * cross).sum() / (source @ gram * source).sum()
        pull = ridge * gram.diagonal().mean()
        pulled = gram.clone()
        pulled.diagonal().add_(pull)
        try:
            fitted = torch.linalg.solve(pulled, cross + pull * scale * source.t()).t()
        except torch.linalg.LinAlgError as error:
            raise ConfigurationError(
                f"stage.alignment.calibration_ridge={ridge} is too small, so that the fit has no single "
                "solution; raise it, e.g. to 0.3, or raise stage.alignment.calibration_tokens"
            ) from error
        local.copy_(fitted.chunk(tp_group.size(), dim=1)[tp_group.rank()])
        explained = 2 * (fitted.t() * cross).sum() - (fitted @ gram * fitted).sum()
        return float(1 - explained / self.power)
