#!/usr/bin/env python
"""Choose which layers keep softmax attention: the same as the installed `spikingbrain-choose-layers`."""

from spikingbrain_train.commands.programs import choose_layers

if __name__ == "__main__":
    choose_layers()
