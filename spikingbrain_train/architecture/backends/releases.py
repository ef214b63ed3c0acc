"""Releases of the GPU libraries that our calls were written against. No torch.

The calls themselves are in the adapters (ops/, hf/ and, for Transformer Engine and grouped_gemm,
megatron-core's classes). What their functions take in each release here was read from the published sources
by ``scripts/record_signatures.py``; ``tests/gpu_libraries/`` binds our calls to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class Releases:
    """Releases of one library whose sources our calls were held to, oldest first."""

    sources: tuple[str, ...]
    """As pip names them: ``flash-attn==2.8.3``. A library may come from several distributions."""

    @property
    def versions(self) -> tuple[str, ...]:
        """Their numbers."""
        return tuple(source.partition("==")[2] for source in self.sources)

    def outside(self, installed: str) -> str | None:
        """Why an installed release is none that was looked at, in words behind its name; None if it may be.

        Between the oldest and the newest counts as looked at, and so do ``.post`` and local builds of one.
        What has no number that could be compared gets no sentence.
        """
        try:
            found = Version(Version(installed).base_version)
        except InvalidVersion:
            return None
        first, last = (Version(Version(name).base_version) for name in (self.versions[0], self.versions[-1]))
        if first <= found <= last:
            return None
        side = "older" if found < first else "newer"
        return f"is {side} than the releases that its calls were written against ({first} to {last})"


RELEASES: Mapping[str, Releases] = MappingProxyType(
    {
        "flash_attn": Releases(("flash-attn==2.6.3", "flash-attn==2.7.4.post1", "flash-attn==2.8.3")),
        "fla": Releases(("flash-linear-attention==0.3.0", "fla-core==0.4.2", "fla-core==0.6.0")),
        "mamba_ssm": Releases(("mamba-ssm==2.2.0", "mamba-ssm==2.2.2", "mamba-ssm==2.3.2.post1")),
        "transformer_engine": Releases(
            ("transformer-engine==2.1.0", "transformer-engine==2.9.0", "transformer-engine==2.20.2")
        ),
        "grouped_gemm": Releases(("grouped_gemm==0.3.0", "nv-grouped-gemm==1.1.4.post8")),
    }
)
"""By the module that a backend calls (``Backend.package``)."""


def untested(packages: Mapping[str, str]) -> dict[str, str]:
    """Installed libraries whose release is outside, and why in words behind ``package version``.

    Args:
        packages: module -> installed version, as metadata has it; nothing is imported.
    """
    return {
        package: f"{installed} {why}"
        for package, installed in packages.items()
        if package in RELEASES and (why := RELEASES[package].outside(installed)) is not None
    }
