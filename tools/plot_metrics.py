#!/usr/bin/env python
"""Draw runs, alone, end to end or compared: the same as the installed `spikingbrain-plot`."""

from spikingbrain_train.commands.programs import plot

if __name__ == "__main__":
    plot()
