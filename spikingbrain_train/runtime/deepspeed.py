"""DeepSpeed inside a world that is already joined: on the right platform, quietly, compiling nothing."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.patch import ON_CPU, Moment, Patch

_PLATFORM = "DS_ACCELERATOR"


def import_deepspeed(accelerator: Accelerator) -> Any:
    """The package, using the process group that this rank has joined.

    It decides on its platform when it is imported: on a machine with a GPU it would take that for a CPU run.

    Args:
        accelerator: platform of this process.
    """
    os.environ.setdefault(_PLATFORM, "cuda" if accelerator.is_gpu else "cpu")
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.WARNING)
    if comm.cdb is not None:  # of a world that this process was in before
        comm.cdb = None
        groups._release_process_group_references(group=None)
        _number_anew()
    if not accelerator.is_gpu:
        compile_no_shared_memory_op()
    one_optimizer_for_all_precisions()
    deepspeed.init_distributed(
        dist_backend=accelerator.collective_backend, auto_mpi_discovery=False, verbose=False
    )
    return deepspeed


def _number_anew() -> None:
    """Let ZeRO 3 number modules and parameters from 0 on, as ranks do that were in no world before.

    It compares the numbers of modules between ranks, and counts on for ever.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    (numbers,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    numbers[0] = Init.param_id = 0


def compile_no_shared_memory_op() -> None:
    """Have CPU ranks talk over torch's gloo alone."""
    # As an attribute of deepspeed.comm that name is the library torch itself.
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def one_optimizer_for_all_precisions() -> None:
    """Have ZeRO 1 in bf16 be the optimizer of ZeRO 1 in fp32 and of ZeRO 2."""
    engine: Any = import_module("deepspeed.runtime.engine")
    engine.DeepSpeedEngine._do_optimizer_sanity_check = lambda self, optimizer: engine.ZERO_OPTIMIZATION


PATCHES = (
    Patch(
        name="compile_no_shared_memory_op",
        changes="deepspeed.comm.torch.build_shm_op gives none",
        reason="where a compiler and AVX-512 are there, each CPU rank would compile an extension in C++ for "
        "minutes at its start, and sum in another order with it",
        apply=compile_no_shared_memory_op,
        platforms=ON_CPU,
        moment=Moment.using,
    ),
    Patch(
        name="one_optimizer_for_all_precisions",
        changes="DeepSpeedEngine's choice of an optimizer gives that of ZeRO 1 and 2",
        reason="for ZeRO 1 in bf16 with fp32 gradients it would take its BF16_Optimizer, which cuts, clips "
        "and reduces otherwise; ZeRO 1 and 2's own has fp32 main weights and gradients in bf16, too",
        apply=one_optimizer_for_all_precisions,
        moment=Moment.using,
    ),
)
