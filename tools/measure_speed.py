#!/usr/bin/env python
"""How fast this machine trains and evaluates: the same as the installed `spikingbrain-measure-speed`."""

from spikingbrain_train.commands.programs import measure_speed

if __name__ == "__main__":
    measure_speed()
