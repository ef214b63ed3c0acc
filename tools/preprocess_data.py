#!/usr/bin/env python
"""Tokenize text into Megatron indexed datasets: the same as the installed `spikingbrain-preprocess`."""

from spikingbrain_train.commands.programs import preprocess

if __name__ == "__main__":
    preprocess()
