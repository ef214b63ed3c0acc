#!/usr/bin/env python
"""How fast this machine trains and evaluates: `python tools/measure_speed.py --help`."""

from spikingbrain_train.pipelines.demo.speed import measure_speed_command_line

if __name__ == "__main__":
    measure_speed_command_line()
