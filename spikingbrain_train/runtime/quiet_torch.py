"""Keeps notices of torch and megatron-core away that no user of this project can do anything about.

A torch that was built for CUDA, on a machine that has a CUDA toolkit (a CUDA_HOME, an nvcc) but no GPU, says
"No CUDA runtime is found, using CUDA_HOME=..." on standard error as soon as torch.utils.cpp_extension is
imported, which megatron-core does. torch 2.6 prints it, later versions log it; neither asks first. Which
platform a run is on is said by the run itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from importlib.abc import Loader
from types import ModuleType

from spikingbrain_train.runtime.import_hook import import_with
from spikingbrain_train.runtime.patch import Moment, Patch

_MODULE = "torch.utils.cpp_extension"
_NOTICE = "No CUDA runtime is found"


def _without_notice(loader: Loader, module: ModuleType) -> None:
    """Whatever else the module writes to standard error is passed on."""
    said = io.StringIO()
    logging.getLogger(_MODULE).addFilter(_is_not_the_notice)
    try:
        with contextlib.redirect_stderr(said):
            loader.exec_module(module)
    finally:
        lines = said.getvalue().splitlines(keepends=True)
        sys.stderr.write("".join(line for line in lines if _NOTICE not in line))


def _is_not_the_notice(record: logging.LogRecord) -> bool:
    return _NOTICE not in str(record.msg)


def drop_cuda_notice() -> None:
    """Leave the notice out when torch.utils.cpp_extension is imported. Calling it again changes nothing."""
    import_with(_MODULE, _without_notice)


def ignore_megatron_warnings() -> None:
    """For commands that build models: drop what megatron-core and torch warn of on every start."""
    # On every start megatron-core tells that Apex is absent and which of its own calls are deprecated.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.")
    # torch 2.13 renames collectives that torch 2.6 knows by the old names only.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")


def silence_deprecation_notices() -> None:
    """Drop the log lines in which 0.19 announces removals that runtime/megatron_versions.py handles."""
    for logger_name, beginning in _NOTICES:
        logging.getLogger(logger_name).addFilter(_DropMessagesStartingWith(beginning))


_NOTICES = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)


class _DropMessagesStartingWith(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


PATCHES = (
    Patch(
        name="no_cuda_notice",
        changes="what torch.utils.cpp_extension says when it is imported, less one sentence",
        reason="torch for CUDA on a machine with a CUDA toolkit and no GPU says it finds no CUDA runtime",
        apply=drop_cuda_notice,
        moment=Moment.importing,
    ),
    Patch(
        name="no_megatron_warnings",
        changes="filters of Python's warnings, in commands that build models",
        reason="each start would tell that Apex is absent and which of its calls megatron-core deprecates",
        apply=ignore_megatron_warnings,
        moment=Moment.importing,
    ),
    Patch(
        name="no_removal_notices",
        changes="filters of three loggers of megatron-core",
        reason="every rank would announce that GPTModel and parts of dist_checkpointing are to be removed",
        apply=silence_deprecation_notices,
        versions="megatron-core>=0.17",
    ),
)
