"""Makes the stage that a run names, with the teacher that it learns from."""

from __future__ import annotations

from spikingbrain_train.config.import_path import object_at
from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.config.run import RunConfig, StageConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.training.build import build_teacher
from spikingbrain_train.training.stages.stage import Stage


def build_stage(config: RunConfig, kernels: KernelConfig, groups: ProcessGroups) -> Stage:
    """The stage of a run, its teacher loaded where it learns from one."""
    needs_teacher = kind_of(config.stage).needs_teacher(config.stage)
    teacher = build_teacher(config, kernels, groups) if needs_teacher else None
    return make_stage(config.stage, groups, teacher)


def make_stage(stage: StageConfig, groups: ProcessGroups, teacher: HybridGPTModel | None) -> Stage:
    """What ``stage.kind`` names.

    Args:
        stage: its settings.
        groups: process groups.
        teacher: the frozen dense source in the same topology; None where the stage learns from none.
    """
    return object_at(kind_of(stage).trained_by)(stage, groups, teacher)
