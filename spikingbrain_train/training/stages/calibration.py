"""The start of an align stage: what can be set in closed form is set before gradient descent begins.

Two things are wrong with a freshly swapped linear attention layer, and neither needs training to mend:

- A channel that forgets slowly sums up many keys, one that forgets fast only a few, so slow channels drown
  the others. Each channel's keys are scaled by the share that one step adds, ``1 - g``, as if the state were
  a moving average.
- The output projection was made for another attention's output. It is fitted again, by least squares on a few
  thousand tokens, pulled towards the source's projection so that rarely seen directions keep their meaning.

Both are this project's own (docs/recipe.md), not a part of SpikingBrain's report.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import FeatureMap, GateKind
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention
from spikingbrain_train.parallel.process_groups import ProcessGroups


@torch.no_grad()
def balance_keys(mixer: GatedLinearAttention) -> None:
    """Scale every key channel by ``(1 - g) / max(1 - g)``; g is the decay that the gate's bias alone gives.

    ReLU features pass a positive factor through, and so does the norm behind the recurrence up to the
    channels' balance, which is what changes. With q/k norms the factor goes into the key norm's weight, else
    into the key rows of ``linear_qkv``.

    Other mixers are left as they are: the keys of a tied gate are that share already, and sigmoid features do
    not scale with their logits.
    """
    if mixer.gate is not GateKind.low_rank or mixer.feature_map is not FeatureMap.relu:
        return
    bias_GK = mixer.linear_gate_up_proj.bias.float().view(-1, mixer.key_hidden_size)
    share_GK = -torch.expm1(torch.nn.functional.logsigmoid(bias_GK) / mixer.gate_logit_normalizer)
    factor_GK = share_GK / share_GK.amax(dim=-1, keepdim=True)
    if mixer.config.qk_layernorm:
        # One weight serves all groups; the initial bias is the same in all of them.
        mixer.k_layernorm.weight.mul_(factor_GK[0])
        return
    groups, key_size = factor_GK.shape
    heads_per_group = mixer.num_attention_heads_per_partition // groups
    for rows in (mixer.linear_qkv.weight, mixer.linear_qkv.bias):
        if rows is not None:
            blocks = rows.view(groups, heads_per_group + 2, key_size, -1)
            blocks[:, heads_per_group].mul_(factor_GK[..., None])


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

    def __init__(self, mixer: GatedLinearAttention, groups: ProcessGroups) -> None:
        self.mixer = mixer
        self.groups = groups
        features = mixer.query_projection_size
        device = mixer.linear_proj.weight.device
        self.gram = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.cross = torch.zeros(features, mixer.config.hidden_size, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, hidden_states: Tensor, target: Tensor, layout: SequenceLayout | None = None) -> None:
        """Take one micro-batch into the sums.

        Args:
            hidden_states: [T, B, hidden_size] normed input of the layer (this rank's share under sequence
                parallelism).
            target: output of the dense layer, shaped like ``hidden_states``.
            layout: how the sequences lie on context-parallel ranks, and their documents.
        """
        tp_group = self.groups.collection.tp
        heads = self.mixer.normed_heads(hidden_states, layout)
        y = gather_from_tensor_model_parallel_region(heads, group=tp_group)
        if self.mixer.config.sequence_parallel:
            target = gather_from_sequence_parallel_region(target, group=tp_group)
        y, target = y.flatten(0, 1).float(), target.flatten(0, 1).float()
        self.gram.addmm_(y.t(), y)
        self.cross.addmm_(y.t(), target)

    @torch.no_grad()
    def solve(self, ridge: float) -> None:
        """Replace the projection by the fitted one; every rank solves the same system, keeps its columns.

        Raises:
            ConfigurationError: the system has no single solution.
        """
        for sums in (self.gram, self.cross):
            torch.distributed.all_reduce(sums, group=self.groups.collection.dp_cp)
        tp_group = self.groups.collection.tp
        local = self.mixer.linear_proj.weight
        source = gather_from_tensor_model_parallel_region(local.float(), group=tp_group).double()
        gram, cross = self.gram.double(), self.cross.double()
        scale = (source.t() * cross).sum() / (source @ gram * source).sum()
        pull = ridge * gram.diagonal().mean()
        gram.diagonal().add_(pull)
        try:
            fitted = torch.linalg.solve(gram, cross + pull * scale * source.t()).t()
        except torch.linalg.LinAlgError as error:
            raise ConfigurationError(
                f"stage.alignment.calibration_ridge={ridge} is too small, so that the fit has no single "
                "solution; raise it, e.g. to 0.3, or raise stage.alignment.calibration_tokens"
            ) from error
        local.copy_(fitted.chunk(tp_group.size(), dim=1)[tp_group.rank()])
