#!/usr/bin/env python
"""Pictures of runs from their metrics: `python tools/plot_metrics.py --help`."""

from __future__ import annotations

from spikingbrain_train.reporting.command_line import plot

if __name__ == "__main__":
    plot()
