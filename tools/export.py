#!/usr/bin/env python
"""Write a Megatron checkpoint as a Hugging Face folder: the same as the installed `spikingbrain-export`."""

from spikingbrain_train.commands.programs import export

if __name__ == "__main__":
    export()
