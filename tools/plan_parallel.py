#!/usr/bin/env python
"""Search a layout for a model and a cluster: the same as the installed `spikingbrain-plan-parallel`."""

from spikingbrain_train.commands.programs import plan_parallel

if __name__ == "__main__":
    plan_parallel()
