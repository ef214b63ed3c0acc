#!/usr/bin/env python
"""Run a pipeline, stage after stage: the same as the installed `spikingbrain-pipeline`."""

from spikingbrain_train.commands.programs import pipeline

if __name__ == "__main__":
    pipeline()
