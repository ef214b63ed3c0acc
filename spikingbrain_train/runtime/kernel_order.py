"""Whether kernels on a GPU start in the order in which they were queued.

Megatron's overlap of tensor- and context-parallel communication with products counts on it: with several
queues a product may start ahead of the communication that it should hide
(megatron.core.tensor_parallel.layers). accelerator.py asks for it where nobody has said otherwise.
"""

from __future__ import annotations

import os

import torch

from spikingbrain_train.config.parallel import AcceleratorKind, ParallelConfig
from spikingbrain_train.runtime.accelerator import CONNECTIONS, Accelerator

_BLACKWELL = 10
"""The first compute capability whose GPUs keep the order anyway."""


def kernel_order_warning(parallel: ParallelConfig, accelerator: Accelerator) -> str | None:
    """A sentence if the environment says otherwise in a layout that needs it, else None.

    Megatron-LM refuses that with tensor or context parallelism on NVIDIA's GPUs before Blackwell, as
    megatron-core warns of it; numbers do not change.

    Args:
        parallel: degrees of the run.
        accelerator: this process's platform.
    """
    value = os.environ.get(CONNECTIONS, "1")
    if not accelerator.is_gpu or value == "1":
        return None
    degrees = {
        name: getattr(parallel, name) for name in ("tensor_model_parallel_size", "context_parallel_size")
    }
    needing = [f"parallel.{name}={degree}" for name, degree in degrees.items() if degree > 1]
    if not needing:
        return None
    if accelerator.kind is AcceleratorKind.cuda and torch.cuda.get_device_capability()[0] >= _BLACKWELL:
        return None
    return (
        f"warning: {CONNECTIONS}={value} lets products start ahead of the communication of "
        f"{' and '.join(needing)} that they should hide, which is slower; unset it or set it to 1"
    )
