"""Which platform this process runs on, and everything that differs between platforms.

Three platforms exist: NVIDIA GPUs (``cuda``), MetaX GPUs (``metax``, which also appear through
``torch.cuda``), and the CPU with gloo collectives (``cpu``). :func:`detect` looks once and returns a frozen
:class:`Accelerator`; the rest of the project asks that object instead of calling ``torch.cuda``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from spikingbrain_train.architecture.backends.backend import Machine
from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime import packages as installed

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

# Module name -> names of the distributions that may provide it, in order of preference.
OPTIONAL_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "transformer_engine": ("transformer-engine", "transformer_engine"),
        "apex": ("apex",),
        "flash_attn": ("flash-attn", "flash_attn"),
        "fla": ("flash-linear-attention", "fla-core"),
        "mamba_ssm": ("mamba-ssm", "mamba_ssm"),
        "grouped_gemm": ("grouped-gemm", "nv-grouped-gemm"),
        "triton": ("triton",),
        "deepspeed": ("deepspeed",),
    }
)

# These import on a CPU-only machine but their kernels run on GPUs alone.
GPU_ONLY_PACKAGES = frozenset(
    backend.package for table in TABLES.values() for backend in table if backend.gpu and backend.package
)


@dataclass(frozen=True)
class Accelerator:
    """The platform of this process. Made by :func:`detect`, never changed."""

    kind: AcceleratorKind
    """``cuda``, ``metax`` or ``cpu``; never ``auto``."""
    device_name: str
    """Marketing name of the GPU or CPU."""
    device_count: int
    """GPUs visible to this process; 0 on CPU."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Optional packages that are installed, with their versions."""

    @property
    def is_gpu(self) -> bool:
        """True on NVIDIA and MetaX GPUs."""
        return self.kind is not AcceleratorKind.cpu

    @property
    def device_type(self) -> str:
        """torch's device type: ``cuda`` on both kinds of GPU, else ``cpu``."""
        return "cuda" if self.is_gpu else "cpu"

    @property
    def collective_backend(self) -> str:
        """torch.distributed backend: ``nccl`` (MetaX's MCCL answers to that name too) or ``gloo``."""
        return "nccl" if self.is_gpu else "gloo"

    @property
    def supported_dtypes(self) -> tuple[torch.dtype, ...]:
        """Floating types that a model can be trained in here."""
        if not self.is_gpu:
            return (torch.float32, torch.bfloat16, torch.float64)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        return (torch.float32, torch.float16, torch.float64)

    def require_dtype(self, dtype: torch.dtype) -> None:
        """Raise :class:`PlatformError` if models cannot be trained in ``dtype`` here."""
        if dtype not in self.supported_dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.supported_dtypes)
            raise PlatformError(
                f"{self.device_name} does not support {str(dtype).removeprefix('torch.')}; "
                f"choose one of {names}."
            )

    def device(self, local_rank: int = 0) -> torch.device:
        """The device of the rank with this index on its node.

        Raises:
            PlatformError: there are fewer GPUs than ranks on this node.
        """
        if not self.is_gpu:
            return torch.device("cpu")
        if local_rank >= self.device_count:
            raise PlatformError(
                f"local rank {local_rank} has no GPU: this node shows {self.device_count}; start at most "
                f"{self.device_count} ranks per node (--nproc-per-node, srun --ntasks-per-node)."
            )
        return torch.device("cuda", local_rank)

    def bind(self, local_rank: int = 0) -> torch.device:
        """Make :meth:`device` the current one of this process and return it."""
        device = self.device(local_rank)
        if self.is_gpu:
            torch.cuda.set_device(device)
        return device

    def has(self, package: str) -> bool:
        """True if ``package`` (a key of ``OPTIONAL_PACKAGES``) is installed and its kernels run here."""
        if package not in OPTIONAL_PACKAGES:
            raise ValueError(
                f"{package!r} is not an optional package of this project: {sorted(OPTIONAL_PACKAGES)}"
            )
        return package in self.packages and (self.is_gpu or package not in GPU_ONLY_PACKAGES)

    def machine(self) -> Machine:
        """What backends ask about this platform."""

        def failure(package: str) -> str | None:
            return installed.package_failure(package) if package in self.packages else "is not installed"

        return Machine(
            self.is_gpu,
            failure,
            lambda name: installed.defines(name),
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    def describe(self) -> str:
        """One line for run_details.txt: platform, device, backend, versions and optional packages."""
        count = f"{self.device_count} x " if self.device_count > 1 else ""
        usable = [f"{name} {version}" for name, version in self.packages.items() if self.has(name)]
        idle = [name for name in self.packages if not self.has(name)]
        text = (
            f"platform {self.kind.value}: {count}{self.device_name}, "
            f"collectives over {self.collective_backend}, torch {torch.__version__}, "
            f"Python {platform.python_version()}, optional packages: {', '.join(usable) or 'none'}"
        )
        return text + (f" (installed, but idle without a GPU: {', '.join(idle)})" if idle else "")

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued; nothing is queued on CPU."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def memory_bytes(self) -> int | None:
        """Memory of the current GPU in bytes; None on the CPU, whose ranks share what the machine has."""
        if not self.is_gpu:
            return None
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory

    def peak_memory_bytes(self) -> int:
        """Most memory held so far, in bytes: allocated tensors on a GPU, the resident set on CPU."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes

    def get_rng_state(self) -> dict[str, torch.Tensor]:
        """States of the generators in use: uint8 tensors under ``cpu`` and, on a GPU, ``cuda``."""
        states = {"cpu": torch.get_rng_state()}
        if self.is_gpu:
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def set_rng_state(self, states: Mapping[str, torch.Tensor]) -> None:
        """Restore what :meth:`get_rng_state` returned; a GPU's state is left aside on CPU."""
        torch.set_rng_state(states["cpu"])
        if self.is_gpu and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def detect(requested: AcceleratorKind | str = AcceleratorKind.auto) -> Accelerator:
    """Look at this machine and return its accelerator.

    Args:
        requested: ``auto`` takes a GPU if torch sees one, else the CPU; any other kind is an order. ``cpu``
            on a machine with GPUs leaves them alone.

    Raises:
        PlatformError: the requested platform is not here.
    """
    try:
        requested = AcceleratorKind(requested)
    except ValueError:
        kinds = ", ".join(kind.value for kind in AcceleratorKind)
        raise PlatformError(f"cluster.accelerator={requested} is unknown; choose one of {kinds}.") from None
    if requested is not AcceleratorKind.cpu and torch.backends.cuda.is_built():
        # Megatron's overlap of tensor- and context-parallel communication with products needs kernels to
        # start in the order in which they were queued. CUDA reads it when it starts: asking for a GPU does.
        os.environ.setdefault(CONNECTIONS, "1")
    packages = MappingProxyType(installed_packages())
    if requested is AcceleratorKind.cpu or (
        requested is AcceleratorKind.auto and not torch.cuda.is_available()
    ):
        return Accelerator(AcceleratorKind.cpu, _cpu_name(), 0, packages)
    if not torch.cuda.is_available():
        raise PlatformError(
            f"cluster.accelerator={requested.value}, but torch {torch.__version__} sees no GPU{_maca_hint()}"
            "; choose cluster.accelerator=cpu or auto, or install a torch build for this machine."
        )
    name = torch.cuda.get_device_name(0)
    found = AcceleratorKind.metax if _is_metax(name, torch.__version__) else AcceleratorKind.cuda
    if requested not in (AcceleratorKind.auto, found):
        raise PlatformError(
            f"cluster.accelerator={requested.value}, but this machine's GPU is {name!r} ({found.value}); "
            f"choose cluster.accelerator={found.value} or auto."
        )
    return Accelerator(found, name, torch.cuda.device_count(), packages)


def installed_packages() -> dict[str, str]:
    """Optional packages that are installed and their versions, found without importing them."""
    found = {}
    for module, distributions in OPTIONAL_PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is None or (module == "apex" and not _is_nvidia_apex(spec.submodule_search_locations)):
            continue
        found[module] = next((v for v in map(_version, distributions) if v), "unknown version")
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_nvidia_apex(locations: object) -> bool:
    """Tell NVIDIA's apex from PyPI's unrelated web toolkit of that name by the folders it brings."""
    return any(
        (Path(str(location)) / "multi_tensor_apply").is_dir()
        and (Path(str(location)) / "optimizers").is_dir()
        for location in (locations or ())  # type: ignore[attr-defined]
    )


def _is_metax(device_name: str, torch_version: str) -> bool:
    """MetaX devices are named "MetaX ..."; their torch builds end in "+metax..."."""
    return "metax" in device_name.lower() or "metax" in torch_version.lower()


def _maca_hint() -> str:
    path = Path(os.environ.get("MACA_PATH", "/opt/maca"))
    if path.is_dir() and not _is_metax("", torch.__version__):
        return f" (MetaX's runtime lies in {path}, but this torch is not a +metax build)"
    return ""


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
