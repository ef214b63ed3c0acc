#!/usr/bin/env python
"""Cache the teacher's logits for a distill run: the same as the installed `spikingbrain-cache-teacher`."""

from spikingbrain_train.commands.programs import cache_teacher

if __name__ == "__main__":
    cache_teacher()
