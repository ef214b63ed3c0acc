"""What a backend is, and how one is chosen: the one resolver of every op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from spikingbrain_train.errors import PlatformError

Call = TypeVar("Call")
"""What decides which backends can compute something: a dataclass of plain values, one for each table."""

AUTO = "auto"


@dataclass(frozen=True)
class Machine:
    """Where something is computed, as far as backends are concerned. Made in spikingbrain_train/runtime."""

    is_gpu: bool
    package_failure: Callable[[str], str | None]
    """Why the kernels of a package cannot be used here, in words behind its name; None if they can."""
    defines: Callable[[str], bool]
    """Whether ``package.module:name`` is there and not None. Imports the module."""
    is_deterministic: bool = False
    """Whether equal inputs have to give equal bits."""


def _can_all(call: object) -> str | None:
    return None


def _has_all(call: object, machine: Machine) -> str | None:
    return None


@dataclass(frozen=True)
class Backend(Generic[Call]):
    """One way to compute something. Its limits are words that follow its name: ``needs float16 or ...``."""

    name: str
    package: str | None = None
    """Module whose kernels it calls."""
    distribution: str = ""
    """What to install for it, if it is called otherwise than the module."""
    gpu: bool = False
    """Whether it runs on GPUs only."""
    limit: Callable[[Call], str | None] = _can_all
    """What it cannot do of a call on any machine; None if it can do all."""
    limit_here: Callable[[Call, Machine], str | None] = _has_all
    """What the installed releases cannot do of a call; None if they can do all."""
    varies: str | None = None
    """Why equal inputs may give other bits; None where they do not."""


class Backends(Generic[Call]):
    """The backends of one op.

    Args:
        setting: of ``cluster.kernels``, which chooses one.
        backends: in the order in which sentences name them.
        preference: of a call and of whether it runs on a GPU: names from the best on. The last one needs
            nothing and can do everything, so that ``auto`` never refuses.
    """

    def __init__(
        self,
        setting: str,
        backends: Sequence[Backend[Call]],
        preference: Callable[[Call, bool], Sequence[str]],
    ) -> None:
        self.setting = setting
        self.preference = preference
        self._backends = {backend.name: backend for backend in backends}

    @property
    def names(self) -> tuple[str, ...]:
        """What the setting takes, ``auto`` first."""
        return (AUTO, *self._backends)

    @property
    def names_on_cpu(self) -> tuple[str, ...]:
        """What the setting takes on a machine without GPUs."""
        return (AUTO, *(name for name, backend in self._backends.items() if not backend.gpu))

    def __iter__(self) -> Iterator[Backend[Call]]:
        return iter(self._backends.values())

    def __getitem__(self, name: str) -> Backend[Call]:
        """The backend of this name.

        Raises:
            ValueError: there is none; names those that there are.
        """
        if name not in self._backends:
            raise ValueError(f"{self.setting}={name} is unknown: choose one of {', '.join(self.names)}")
        return self._backends[name]

    def choose(self, name: str, call: Call, machine: Machine, prefix: str = "") -> str:
        """Who computes a call: the backend asked for, or under ``auto`` the best that is here and can.

        Args:
            name: what the setting says.
            call: what is to be computed.
            machine: where.
            prefix: of the setting in sentences: ``cluster.kernels.``.

        Raises:
            ValueError: the name does not exist, or what it names cannot do this.
            PlatformError: what it names needs a package, a release or a GPU that is missing.
        """
        if name == AUTO:
            return next(
                name
                for name in self.preference(call, machine.is_gpu)
                if self[name].limit(call) is None and self._lack(self[name], call, machine) is None
            )
        backend = self[name]
        if (lack := self._lack(backend, call, machine)) is not None:
            raise PlatformError(f"{prefix}{self.setting}={name} {lack}")
        if (limit := backend.limit(call)) is not None:
            raise ValueError(f"{prefix}{self.setting}={name} {limit}; choose auto")
        return name

    def limit(self, name: str, call: Call) -> str | None:
        """What the backend asked for cannot do of a call on any machine; None if nothing."""
        return None if name == AUTO else self[name].limit(call)

    def expected(self, name: str, call: Call, *, on_gpu: bool) -> str:
        """What a plan reckons with: the one asked for, or the best that can if every package were there."""
        if name != AUTO:
            return name
        return next(name for name in self.preference(call, on_gpu) if self[name].limit(call) is None)

    def require(self, name: str, machine: Machine, prefix: str = "") -> None:
        """Refuse a backend that a config asks for, used or not, and that a machine does not have.

        Raises:
            ValueError: the name does not exist.
            PlatformError: what it names needs a package or a GPU that is missing.
        """
        if name != AUTO and (missing := self._missing(self[name], machine)) is not None:
            raise PlatformError(f"{prefix}{self.setting}={name} {missing}")

    def _lack(self, backend: Backend[Call], call: Call, machine: Machine) -> str | None:
        """What is missing here for a call, and what to do about it; None if nothing is."""
        if (missing := self._missing(backend, machine)) is not None:
            return missing
        limit = backend.limit_here(call, machine)
        return None if limit is None else f"{limit}; choose auto"

    @staticmethod
    def _missing(backend: Backend[Call], machine: Machine) -> str | None:
        if backend.gpu and not machine.is_gpu:
            return "needs a GPU; choose auto"
        if backend.package is not None and (failure := machine.package_failure(backend.package)) is not None:
            package = backend.distribution or backend.package
            return f"needs the package {package}, which {failure}; install it or choose auto"
        if machine.is_deterministic and backend.varies is not None:
            return f"{backend.varies}; choose auto, or set numerics.deterministic=false"
        return None
