#!/usr/bin/env python
"""Draw the loss curves of runs: the same as the installed `spikingbrain-plot`."""

from spikingbrain_train.commands.programs import plot

if __name__ == "__main__":
    plot()
