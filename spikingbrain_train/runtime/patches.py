"""Every patch of torch and megatron-core, on every platform.

Here are the registry, what applies its entries, and the line of the log that names those in force.

``python -m spikingbrain_train.runtime.patches`` prints the table of docs/patches.md.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.runtime import (
    collective_waits,
    deepspeed,
    gloo_polling,
    megatron_cpu,
    megatron_jit,
    megatron_loggers,
    meta_device,
    optimizer_patches,
    quiet_torch,
    shard_writers,
)
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.patch import ALL_PLATFORMS, Moment, Patch

PATCHES: tuple[Patch, ...] = (
    *quiet_torch.PATCHES,
    *megatron_jit.PATCHES,
    *megatron_loggers.PATCHES,
    *megatron_cpu.PATCHES,
    *gloo_polling.PATCHES,
    *shard_writers.PATCHES,
    *optimizer_patches.PATCHES,
    *collective_waits.PATCHES,
    *meta_device.PATCHES,
    *deepspeed.PATCHES,
)
"""In the order in which they are applied."""

_applied: list[str] = []


@cache
def installed_versions() -> dict[str, str]:
    """Versions of what is patched, read once a process: a package's metadata is a long text."""
    return {distribution: version(distribution) for distribution in ("torch", "megatron-core")}


def due(platform: AcceleratorKind) -> list[Patch]:
    """The patches that this platform needs with the installed torch and megatron-core."""
    installed = installed_versions()
    return [patch for patch in PATCHES if patch.is_due(platform, installed)]


def apply(accelerator: Accelerator) -> tuple[str, ...]:
    """Apply what a rank needs from its start and does not have yet. Call it before models are built.

    Returns:
        Names of those patches; the same ones however often this is called.
    """
    starting = [patch for patch in due(accelerator.kind) if patch.moment is Moment.starting]
    for patch in starting:
        if patch.name not in _applied:
            patch.apply()
            _applied.append(patch.name)
    return tuple(patch.name for patch in starting)


def describe(accelerator: Accelerator) -> str:
    """One line for run_details.txt: what is patched on this platform with these versions."""
    patches = due(accelerator.kind)
    whole = ", ".join(patch.name for patch in patches if patch.moment is not Moment.using)
    single = ", ".join(patch.name for patch in patches if patch.moment is Moment.using)
    libraries = " and ".join(f"{name} {number}" for name, number in installed_versions().items())
    return f"patches of {libraries} on {accelerator.kind.value}: {whole}; around single calls: {single}"


def table() -> str:
    """The registry in Markdown."""
    head = "| name | platforms | versions | applied | changes | without it |\n|---|---|---|---|---|---|\n"
    return head + "".join(_row(patch) for patch in PATCHES)


def _row(patch: Patch) -> str:
    platforms = "all"
    if patch.platforms != ALL_PLATFORMS:
        platforms = ", ".join(sorted(kind.value for kind in patch.platforms))
    cells = (
        f"`{patch.name}`",
        platforms,
        patch.versions or "all",
        patch.moment.value,
        patch.changes,
        patch.reason,
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(table(), end="")
