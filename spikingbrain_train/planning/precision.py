"""What ``precision=auto`` becomes, as far as that can be said without torch: for plans, in the first second.

The rule: bf16 where the hardware multiplies it, fp32 elsewhere; a run that is resumed keeps its own. On a CPU
that lacks the instructions, libraries convert every number on its way, which makes bf16 several times slower
than fp32. runtime/bf16.py asks torch the same questions once it is there, and tells when it disagrees.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.planning.launch import has_gpu_device
from spikingbrain_train.planning.resume import run_to_resume

# Flags in /proc/cpuinfo: AVX-512 and AMX (Intel, AMD) and Arm's extension.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# Limits of oneDNN, which multiplies for torch, under which it leaves those instructions alone.
_LIMITS_WITHOUT_BF16 = {
    "sse41",
    "avx",
    "avx2",
    "avx2_vnni",
    "avx2_vnni_2",
    "avx512_core",
    "avx512_core_vnni",
}


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision and where it comes from."""

    precision: Precision
    """fp32 or bf16."""
    reason: str = ""
    """What decided, as the end of a sentence ("because ..."); empty where the config names the precision."""
    assumed: bool = False
    """Said without torch, which may see it otherwise."""

    def describe(self) -> str:
        """One line for the log."""
        return f"precision={self.precision.value}" + (f" {self.reason}" if self.reason else "")


def bf16_instructions(
    cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ
) -> bool | None:
    """Whether this CPU has instructions that multiply bf16 and oneDNN may use them.

    None where the system does not tell.

    ATEN_CPU_CAPABILITY does not matter: it limits torch's own loops, not oneDNN's matrix products.
    """
    limit = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "all"
    if limit.lower() in _LIMITS_WITHOUT_BF16:
        return False
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    flags = next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), None)
    return None if flags is None else not _BF16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def stored_precision(config: RunConfig) -> Precision | None:
    """The precision of the run that this one would go on with, None where it starts anew.

    Raises:
        CheckpointError: what it left is damaged, or no run has written it.
    """
    stored = run_to_resume(config)
    return None if stored is None else stored.config.precision


def settled_precision(config: RunConfig) -> PrecisionChoice | None:
    """The precision where no hardware is asked: named by the config, or by the run that is resumed."""
    if config.precision is not Precision.auto:
        return PrecisionChoice(config.precision)
    stored = stored_precision(config)
    if stored in (None, Precision.auto):
        return None
    return PrecisionChoice(stored, "as in the run that is resumed")


def expected_precision(config: RunConfig) -> PrecisionChoice:
    """What ``precision=auto`` will become on this machine, or on the cluster that the config names.

    Raises:
        CheckpointError: a checkpoint of this run is damaged.
    """
    settled = settled_precision(config)
    if settled is not None:
        return settled
    kind = config.cluster.accelerator
    if kind in (AcceleratorKind.cuda, AcceleratorKind.metax) or (
        kind is AcceleratorKind.auto and has_gpu_device()
    ):
        return PrecisionChoice(Precision.bf16, "because the run is on GPUs", assumed=True)
    return replace(choice_on_cpu(bf16_instructions()), assumed=True)


def choice_on_cpu(has_bf16: bool | None) -> PrecisionChoice:
    """The rule for CPUs; None stands for one that does not tell."""
    if has_bf16 is None:
        system = f"{platform.system()} does not tell whether this CPU multiplies bf16"
        return PrecisionChoice(Precision.fp32, f"because {system}")
    if has_bf16:
        return PrecisionChoice(Precision.bf16, "because this CPU multiplies bf16 in hardware")
    return PrecisionChoice(Precision.fp32, "because this CPU has no bf16 instructions")
