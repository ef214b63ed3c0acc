#!/usr/bin/env python
"""Answer OpenAI-compatible requests: the same as the installed `spikingbrain-serve`."""

from spikingbrain_train.commands.programs import serve

if __name__ == "__main__":
    serve()
