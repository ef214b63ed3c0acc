#!/usr/bin/env python
"""See whether the hosts of a run are fit for it: the same as the installed `spikingbrain-health-check`."""

from spikingbrain_train.commands.programs import health_check

if __name__ == "__main__":
    health_check()
