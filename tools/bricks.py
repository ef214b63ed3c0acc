#!/usr/bin/env python
"""Neurons and experts of a model as bricks: the same as the installed `spikingbrain-bricks`."""

from spikingbrain_train.commands.programs import bricks

if __name__ == "__main__":
    bricks()
