#!/usr/bin/env python
"""Measure the held-out cross entropy and perplexity of a Hugging Face model, dense source or exported hybrid."""

from __future__ import annotations

from spikingbrain_train.evaluation.command_line import evaluate

if __name__ == "__main__":
    evaluate()
