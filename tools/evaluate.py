#!/usr/bin/env python
"""Measure the held-out cross entropy of a Hugging Face model: `python tools/evaluate.py --help`."""

from __future__ import annotations

from spikingbrain_train.evaluation.command_line import evaluate

if __name__ == "__main__":
    evaluate()
