"""The differences between megatron-core 0.16.1 and 0.19.x that this project meets, in one place.

0.16.1 is the last version for Python 3.10 and 3.11; 0.17 and later need 3.12. What was compared and is the
same in both for our purposes needs nothing here: ``get_megatron_optimizer(config_overrides=...)`` with
``ParamKey``, ``DistributedDataParallel``, ``finalize_model_grads``, ``get_forward_backward_func`` with
``adjust_tensor_shapes_fn``, ``OptimizerParamScheduler``, ``model_parallel_cuda_manual_seed``,
``ProcessGroupCollection.use_mpu_process_groups`` and the sharding metadata (``non_homogeneous_layers``,
``distrib_optim_sharding_type="fully_reshardable"``). What differs:

- Values of a checkpoint that are not tensors: 0.16.1 keeps them in the file ``common.pt``, 0.19 in an object
  ``common_state`` among the shards (it still reads the file where there is one).
- ``dist_checkpointing.load``: 0.16.1 takes ``common_strategy``, which 0.19 lacks.
- ``metadata.json``: 0.19 leaves out ``common_backend``, which 0.16.1 looks for.
- Writing a checkpoint: 0.16.1 forks a process for every file, 0.19 takes threads; here both take threads
  (runtime/shard_writers.py). ``dist_checkpointing.save(async_sharded_save=True)`` has two strategies in 0.19.
- A failing read or write: torch's ``CheckpointException`` is a ``BaseException`` in both and is turned into
  an exception by checkpoint/torch_dist.py.
- Experts in one grouped GEMM: 0.16.1 has a ``GroupedMLP`` on the package grouped_gemm beside Transformer
  Engine's, later versions only the latter.
- The ``mlp`` and the parts of a mixture of experts are ModuleSpecs in 0.16.1 and callables that build them in
  0.19 (:func:`layers_are_built_by_callables`).
- The balancing losses of megatron-core's own router: under tensor and context parallelism 0.16.1 scales them
  down by the number of ranks; ours is the same in both (models/feed_forwards/moe/router.py).
- 0.19 logs that ``GPTModel`` and parts of ``dist_checkpointing`` will be removed.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

from spikingbrain_train.errors import PlatformError

MEGATRON_VERSION = Version(version("megatron-core"))
OLDEST, FIRST_UNTESTED = Version("0.16.1"), Version("0.20")

HAS_GROUPED_MLP = MEGATRON_VERSION.release < (0, 17)
"""Whether it has experts on the package grouped_gemm."""

COMMON_STATE_IN_FILE = MEGATRON_VERSION.release < (0, 17)
"""Whether plain values of a checkpoint are found in ``common.pt`` alone."""
OPTIONS_OF_SAVING: dict[str, Any] = {} if COMMON_STATE_IN_FILE else {"async_strategy": "mcore"}
"""What ``dist_checkpointing.save(async_sharded_save=True)`` takes to write as it does without being
asynchronous; 0.19 would use the package nvidia_resiliency_ext."""


def check_version(found: Version = MEGATRON_VERSION) -> None:
    """Raise :class:`PlatformError` if the installed megatron-core is not one that this project supports."""
    if not OLDEST <= found < FIRST_UNTESTED:
        raise PlatformError(
            f"megatron-core {found} is not supported; install megatron-core>={OLDEST},<{FIRST_UNTESTED} "
            "(0.16.1 on Python 3.10 and 3.11)."
        )


def layers_are_built_by_callables() -> bool:
    """Whether the ``mlp`` of a layer and the parts of a mixture of experts are callables, not ModuleSpecs."""
    from megatron.core.transformer.mlp import MLP

    return hasattr(MLP, "as_mlp_submodule")
