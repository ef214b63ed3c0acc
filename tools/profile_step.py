#!/usr/bin/env python
"""What a training step's time goes to: the same as the installed `spikingbrain-profile-step`."""

from spikingbrain_train.commands.programs import profile_step

if __name__ == "__main__":
    profile_step()
