"""What computes the mixers of a run on this machine: refused before the first step, and said in the log.

A mixer's op chooses call by call from the table of its backends. Here the same table is asked about the calls
that the run will make.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spikingbrain_train.architecture.backends.releases import untested
from spikingbrain_train.architecture.backends.rotary import ROTARY
from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.kernel_calls import asked_for, mixer_calls, rotary_calls
from spikingbrain_train.runtime.accelerator import Accelerator


@dataclass(frozen=True)
class KernelChoices:
    """What computes a run."""

    kernels: KernelConfig
    """As the model is built: linears and experts are resolved."""
    mixers: dict[str, dict[str, list[str]]]
    """Setting of ``cluster.kernels`` -> backend -> the mixers that it computes, in words."""
    set_aside: dict[str, str]
    """Packages that are installed but cannot be used, and why."""
    untested: dict[str, str] = field(default_factory=dict)
    """Packages that can be used in a release that nobody has looked at: which, and what was looked at."""

    def rows(self, *, on_gpu: bool) -> list[tuple[str, str]]:
        """For the user: a GPU has several for a call, and a package may be installed in vain."""
        rows = [("kernels", self._chosen())] if on_gpu else []
        return (
            rows
            + [
                ("not used", f"{package}, which is installed: it {failure}")
                for package, failure in self.set_aside.items()
            ]
            + [
                ("warning", f"{package} {why}; if a kernel fails, install one of those")
                for package, why in self.untested.items()
            ]
        )

    def _chosen(self) -> str:
        chosen = {table.setting: getattr(self.kernels, table.setting).value for table in TABLES.values()}
        chosen |= {setting: _describe(choices) for setting, choices in self.mixers.items()}
        words = {setting: setting.replace("_", " ") for setting in chosen} | _WORDS
        return ", ".join(f"{words[setting]} {name}" for setting, name in chosen.items())

    def describe(self) -> str:
        """One line for run_details.txt."""
        text = f"kernels: {self._chosen()}"
        for package, failure in self.set_aside.items():
            text += f"; {package} is not used: it {failure}"
        return text


_WORDS = {"parallel_linear": "parallel linears"}


def choose_kernels(config: RunConfig, kernels: KernelConfig, accelerator: Accelerator) -> KernelChoices:
    """What computes a run here.

    Args:
        config: the run; its precision is fp32 or bf16.
        kernels: with linears and experts resolved.
        accelerator: this process's platform and packages.

    Raises:
        ConfigurationError: a kernel is asked for by name that cannot do what the run needs.
        PlatformError: a kernel is asked for by name that is not here.
    """
    machine = accelerator.machine()
    mixers: dict[str, dict[str, list[str]]] = {}
    try:
        for what, kind, call in mixer_calls(config):
            if kind.backends is None:
                continue
            setting = kind.backends.setting
            name = kind.backends.choose(asked_for(kernels, setting), call, machine, "cluster.kernels.")
            computed = mixers.setdefault(setting, {}).setdefault(name, [])
            if what not in computed:
                computed.append(what)
        turned = mixers.setdefault(ROTARY.setting, {})
        for what, turn in rotary_calls(config):
            name = ROTARY.choose(kernels.rotary.value, turn, machine, "cluster.kernels.")
            turned.setdefault(name, []).append(what)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    for kind in MIXERS:
        if kind.backends is not None:
            mixers.setdefault(kind.backends.setting, {})  # in no layer
    packages = dict.fromkeys(backend.package for table in TABLES.values() for backend in table)
    set_aside = {
        package: failure
        for package in packages
        if package is not None
        and accelerator.has(package)
        and (failure := machine.package_failure(package)) is not None
    }
    usable = {
        package: version
        for package, version in accelerator.packages.items()
        if accelerator.has(package) and package not in set_aside
    }
    return KernelChoices(kernels, mixers, set_aside, untested(usable))


def _describe(choices: dict[str, list[str]]) -> str:
    """``flash_attn``, or ``flash_attn (full) and flex (swa)``."""
    if len(choices) < 2:
        return next(iter(choices), "in no layer")
    return " and ".join(f"{name} ({', '.join(whats)})" for name, whats in choices.items())
