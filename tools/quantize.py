#!/usr/bin/env python
"""Make INT8 weights and spikes of a trained hybrid: the same as the installed `spikingbrain-quantize`."""

from spikingbrain_train.commands.programs import quantize

if __name__ == "__main__":
    quantize()
