#!/usr/bin/env python
"""Dense model to exported hybrid in one command: the same as the installed `spikingbrain-demo`."""

from spikingbrain_train.commands.programs import demo

if __name__ == "__main__":
    demo()
