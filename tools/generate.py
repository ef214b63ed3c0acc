#!/usr/bin/env python
"""Generate text, as it comes: the same as the installed `spikingbrain-generate`."""

from spikingbrain_train.commands.programs import generate

if __name__ == "__main__":
    generate()
