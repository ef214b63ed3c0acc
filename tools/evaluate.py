#!/usr/bin/env python
"""Measure the held-out cross entropy of a model: the same as the installed `spikingbrain-evaluate`."""

from spikingbrain_train.commands.programs import evaluate

if __name__ == "__main__":
    evaluate()
