"""Spares processes the import of W&B and TensorBoard, which megatron-core imports with itself.

Its timers and its inference engine could write to them; here callbacks do, and import what a run asked for.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spikingbrain_train.runtime.import_hook import import_with
from spikingbrain_train.runtime.patch import Moment, Patch

if TYPE_CHECKING:
    from importlib.abc import Loader

_LOGGERS = ("wandb", "torch.utils.tensorboard")


def _without_loggers(loader: Loader, module: ModuleType) -> None:
    hidden = [name for name in _LOGGERS if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # None: an import of it fails, which megatron-core is prepared for
    try:
        loader.exec_module(module)
    finally:
        for name in hidden:
            del modules[name]


def leave_loggers_unimported() -> None:
    """Have megatron-core find neither W&B nor TensorBoard while it is imported."""
    import_with("megatron.core", _without_loggers)


PATCHES = (
    Patch(
        name="no_import_of_loggers",
        changes="importing megatron.core imports neither wandb nor torch.utils.tensorboard",
        reason="each start would import both, a tenth of its time, also where a run writes to neither",
        apply=leave_loggers_unimported,
        moment=Moment.importing,
    ),
)
