"""What this project changes in torch and megatron-core: the description of one patch. Torch is not imported.

All of them are listed in runtime/patches.py; no other room assigns to a name of either library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from spikingbrain_train.config.parallel import AcceleratorKind

ALL_PLATFORMS = frozenset({AcceleratorKind.cpu, AcceleratorKind.cuda, AcceleratorKind.metax})
ON_CPU = frozenset({AcceleratorKind.cpu})


class Moment(str, Enum):
    """When a patch is applied; its value says so in the table of docs/patches.md."""

    importing = "before torch is imported"
    """By the package itself, or by a command."""
    starting = "when a rank starts"
    """By :func:`spikingbrain_train.runtime.patches.apply`, once a process."""
    using = "around a call or on an object"
    """By whoever makes the call or the object, and for it alone."""


@dataclass(frozen=True)
class Patch:
    """One thing that torch or megatron-core does, and what is put in its place."""

    name: str
    changes: str
    """What is replaced."""
    reason: str
    """What would happen without it."""
    apply: Callable[..., Any]
    """Without arguments, unless it is applied to a call or an object."""
    platforms: frozenset[AcceleratorKind] = ALL_PLATFORMS
    versions: str = ""
    """Which releases need it, as a requirement (``megatron-core<0.19``); empty is all that are supported."""
    moment: Moment = Moment.starting

    def is_due(self, platform: AcceleratorKind, installed: Mapping[str, str]) -> bool:
        """Whether it is needed here.

        Args:
            platform: of this process; never ``auto``.
            installed: distribution -> version of torch and megatron-core.
        """
        from packaging.requirements import Requirement

        if platform not in self.platforms:
            return False
        if not self.versions:
            return True
        requirement = Requirement(self.versions)
        return requirement.specifier.contains(installed[requirement.name], prereleases=True)
