"""Which windows can be read as they are. Decided without torch."""

from __future__ import annotations

from spikingbrain_train.errors import ConfigurationError


def check_windows(windows: int, seq_length: int) -> None:
    """Windows that are read without padding, which would count, too.

    Raises:
        ConfigurationError: a length that batches would fill up.
    """
    for flag, value in (("--windows", windows), ("--seq-length", seq_length)):
        if not 1 <= value < 2**31:
            raise ConfigurationError(f"{flag} is {value}; give 1 to 2**31 - 1")
    step = 1 << max(0, seq_length.bit_length() - 4)
    if seq_length % step:
        raise ConfigurationError(
            f"--seq-length {seq_length} would be padded, and padding counted; give "
            f"{-(-seq_length // step) * step}"
        )
