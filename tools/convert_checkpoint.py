#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron: the same as the installed `spikingbrain-convert`."""

from spikingbrain_train.commands.programs import convert

if __name__ == "__main__":
    convert()
