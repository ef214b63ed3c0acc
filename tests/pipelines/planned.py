"""A pipeline that is planned where nothing that it reads need be there."""

from __future__ import annotations

from spikingbrain_train.pipelines.pipeline_file import load_pipeline
from spikingbrain_train.pipelines.plan import plan_pipeline
from spikingbrain_train.pipelines.steps import Step


def steps_of(name: str, *arguments: str) -> dict[str, Step]:
    """The steps of a pipeline by name, in the order in which they run."""
    file = load_pipeline(name, arguments)
    return {step.name: step for step in plan_pipeline(file, lambda _: False, incomplete=True).steps}
