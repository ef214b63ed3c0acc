#!/usr/bin/env python
"""Tokenize text into Megatron indexed datasets: `python tools/preprocess_data.py --help`."""

from __future__ import annotations

import sys

from spikingbrain_train.data.command_line import preprocess_data

if __name__ == "__main__":
    sys.exit(preprocess_data())
