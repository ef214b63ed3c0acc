#!/usr/bin/env python
"""What a run would take: the same as the installed `spikingbrain-plan`."""

from spikingbrain_train.commands.programs import plan

if __name__ == "__main__":
    plan()
