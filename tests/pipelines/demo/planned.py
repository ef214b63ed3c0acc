"""The demo's steps, planned from a command line or from variables of its pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spikingbrain_train.pipelines.demo.command_line import demo_pipeline, parse_arguments
from spikingbrain_train.pipelines.pipeline_file import load_pipeline
from spikingbrain_train.pipelines.plan import plan_pipeline
from spikingbrain_train.pipelines.steps import Step


def planned(
    tmp_path: Path, *arguments: str, is_done: Callable[[Step], bool] = lambda _: False, **variables: object
) -> dict[str, Step]:
    """The steps of ``tools/demo.py <arguments>``, or of the pipeline with these variables."""
    variables = {"output": str(tmp_path / "out"), **variables}
    if arguments:
        file = demo_pipeline(parse_arguments(["--output", str(variables["output"]), *arguments]))
    else:
        file = load_pipeline("demo", values=variables)
    return {step.name: step for step in plan_pipeline(file, is_done).steps}
