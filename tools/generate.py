#!/usr/bin/env python
"""Generate text with an exported checkpoint, as it comes: `python tools/generate.py --help`."""

from __future__ import annotations

from spikingbrain_train.evaluation.command_line import generate

if __name__ == "__main__":
    generate()
