#!/usr/bin/env python
"""Count and price the spikes of a model on text: the same as the installed `spikingbrain-analyze-spikes`."""

from spikingbrain_train.commands.programs import analyze_spikes

if __name__ == "__main__":
    analyze_spikes()
