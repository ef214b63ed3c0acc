"""The models that swaps are measured with: the dense source, all layers kept, all candidates swapped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spikingbrain_train.config.stage import AlignmentConfig, AlignmentInputs, StageConfig
from spikingbrain_train.evaluation.checkpoint_model import open_checkpoint
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.layer_choice.text import Text
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.activity import Activity
from spikingbrain_train.training.stages.alignment import Alignment
from spikingbrain_train.training.stages.closed_form import ClosedFormStart


@dataclass(frozen=True)
class Models:
    """On this rank, for inference."""

    teacher: HybridGPTModel
    kept: HybridGPTModel
    swapped: HybridGPTModel


def open_models(
    source: CheckpointRequest, candidates: CheckpointRequest, kept_mixer: object, groups: ProcessGroups
) -> Models:
    """Read the weights of all three.

    Args:
        source: the dense source.
        candidates: a conversion of it, or its aligned form, in which every candidate is swapped.
        kept_mixer: the mixer of layers that stay, which takes the source's weights.
        groups: of the ranks.
    """
    swapped, teacher = (_open(each, groups) for each in (candidates, source))
    # Its windows are those of the conversion, its weights are the source's; sinks come from the candidates.
    model = replace(candidates.model, mixers=[kept_mixer], num_sink_tokens=0)
    kept = _open(replace(source, model=model, run=None), groups)
    _share(kept, teacher)
    return Models(teacher, kept, swapped)


def _open(request: CheckpointRequest, groups: ProcessGroups) -> HybridGPTModel:
    model = open_checkpoint(request, groups).model
    assert isinstance(model, HybridGPTModel), "pipeline stages are refused, virtual ones among them"
    return model


def start_in_closed_form(models: Models, text: Text, groups: ProcessGroups, progress: Activity) -> None:
    """Set the swapped mixers as an align stage does at its start, each on the source's own inputs.

    On the student's own, a layer would be set for what all swaps in front of it leave, and each is looked at
    alone.
    """
    batches = text.batches(groups, models.teacher.model_config.vocab_size)
    stage = StageConfig(alignment=AlignmentConfig(calibration_inputs=AlignmentInputs.teacher))
    replaced = Alignment(stage, groups, models.teacher).replaced_layers(models.swapped)
    start = ClosedFormStart(
        models.swapped, models.teacher, replaced, stage.alignment, groups, quarter=-(-len(batches) // 4)
    )
    start.run(batches, progress)


def share_weights(models: Models) -> None:
    """Let the swapped model have no copies of what it has from the source."""
    _share(models.swapped, models.teacher)


def _share(model: HybridGPTModel, source: HybridGPTModel) -> None:
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        other = theirs.get(name)
        if other is not None and other.shape == parameter.shape and torch.equal(other, parameter):
            parameter.data = other.data
