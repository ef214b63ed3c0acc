#!/usr/bin/env python
"""Count the zeros inside a model's feed-forwards: as the installed `spikingbrain-analyze-sparsity`."""

from spikingbrain_train.commands.programs import analyze_sparsity

if __name__ == "__main__":
    analyze_sparsity()
