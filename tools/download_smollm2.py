#!/usr/bin/env python
"""Get the demo's small dense model: the same as the installed `spikingbrain-download-smollm2`."""

from spikingbrain_train.commands.programs import download_smollm2

if __name__ == "__main__":
    download_smollm2()
