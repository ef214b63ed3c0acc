#!/usr/bin/env python
"""Have a shell complete the commands: the same as the installed `spikingbrain-completion`."""

from spikingbrain_train.commands.programs import completion

if __name__ == "__main__":
    completion()
