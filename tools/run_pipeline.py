#!/usr/bin/env python
"""Run a pipeline, stage after stage: `python tools/run_pipeline.py --help`."""

from __future__ import annotations

from spikingbrain_train.pipelines.command_line import pipelines

if __name__ == "__main__":
    pipelines()
