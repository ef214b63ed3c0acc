"""The errors a user can cause, each carrying one sentence that says what to change.

Command-line entries catch :class:`SpikingBrainError`, print ``error: <sentence>`` and exit with code 2 (3 for
:class:`NumericalError`) on every rank; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class SpikingBrainError(Exception):
    """Base of every error that the user can fix."""


class ConfigurationError(SpikingBrainError):
    """A setting is unknown, out of range, or contradicts another one."""


class PlatformError(SpikingBrainError):
    """The machine lacks what the config asks for: an accelerator, a package, a working backend."""


class DataError(SpikingBrainError):
    """A text file, tokenizer or indexed dataset is missing, malformed or too small."""


class CheckpointError(SpikingBrainError):
    """A checkpoint is missing, truncated, of another architecture, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was saved; an older one may be."""


class NumericalError(SpikingBrainError):
    """A loss, a gradient or a weight is NaN or infinite: the run diverged, whatever its settings say."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
