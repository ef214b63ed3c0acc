"""The kinds of steps that a pipeline can have, by the name that its YAML calls them.

A kind from elsewhere is registered by a module that the pipeline names in ``plugins``.
"""

from __future__ import annotations

from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.pipelines.kinds.analyses import AnalyzeSparsity, AnalyzeSpikes
from spikingbrain_train.pipelines.kinds.command import Command
from spikingbrain_train.pipelines.kinds.kind import Context, StepKind
from spikingbrain_train.pipelines.kinds.tools import (
    ChooseLayers,
    Convert,
    Evaluate,
    Export,
    Generate,
    Preprocess,
)
from spikingbrain_train.pipelines.kinds.train import Train

__all__ = ["STEP_KINDS", "Context", "StepKind"]

STEP_KINDS: Registry[StepKind] = Registry("kind of step", "kind", plugins="plugins: [package.module]")
for _kind in (
    *(Preprocess(), ChooseLayers(), Convert(), Train(), Evaluate(), AnalyzeSpikes(), AnalyzeSparsity()),
    *(Export(), Generate(), Command()),
):
    STEP_KINDS.register(_kind)
