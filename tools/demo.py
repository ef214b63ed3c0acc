#!/usr/bin/env python
"""Dense model to exported hybrid in one command: `python tools/demo.py --help`."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.pipelines.demo.command_line import demo

if __name__ == "__main__":
    demo(Path(__file__).resolve().parents[1])
