#!/usr/bin/env python
"""Get the demo's small dense model as a Hugging Face folder: `python tools/download_smollm2.py --help`."""

from __future__ import annotations

from spikingbrain_train.pipelines.demo.smollm2 import download_command_line

if __name__ == "__main__":
    download_command_line()
