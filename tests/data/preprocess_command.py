"""spikingbrain-preprocess inside this process: importing torch anew takes seconds."""

from __future__ import annotations

import signal

from spikingbrain_train.data.command_line import preprocess_data


def exit_code_of(arguments: list[str]) -> int:
    """Run it; its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        preprocess_data(arguments)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
