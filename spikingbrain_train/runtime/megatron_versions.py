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
  (runtime/shard_writers.py).
- A failing read or write: torch's ``CheckpointException`` is a ``BaseException`` in both and is turned into
  :class:`FailedOnRank` here.
- Experts in one grouped GEMM: 0.16.1 has a ``GroupedMLP`` on the package grouped_gemm beside Transformer
  Engine's, later versions only the latter.
- The ``mlp`` and the parts of a mixture of experts are ModuleSpecs in 0.16.1 and callables that build them in
  0.19 (:func:`layers_are_built_by_callables`).
- The balancing losses of megatron-core's own router: under tensor and context parallelism 0.16.1 scales them
  down by the number of ranks; ours is the same in both (models/moe/router.py).
- 0.19 logs that ``GPTModel`` and parts of ``dist_checkpointing`` will be removed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from spikingbrain_train.errors import CheckpointError, PlatformError
from spikingbrain_train.runtime.checkpoint_metadata import (
    BACKEND_FILE,
    COMMON_STATE_FILE,
    WHOLE_FILES,
    check_shards_are_whole,
    read_metadata,
    shard_ranges,
)
from spikingbrain_train.storage.checkpoint_manifest import Parts, checksums, read_manifest

MEGATRON_VERSION = Version(version("megatron-core"))
OLDEST, FIRST_UNTESTED = Version("0.16.1"), Version("0.20")

HAS_GROUPED_MLP = MEGATRON_VERSION.release < (0, 17)
"""Whether it has experts on the package grouped_gemm."""

_OPTIMIZER = "optimizer."  # how keys of optimizer states begin
COMMON_STATE_IN_FILE = MEGATRON_VERSION.release < (0, 17)
"""Whether plain values of a checkpoint are found in ``common.pt`` alone."""
OPTIONS_OF_SAVING: dict[str, Any] = {} if COMMON_STATE_IN_FILE else {"async_strategy": "mcore"}
"""What ``dist_checkpointing.save(async_sharded_save=True)`` takes to write as it does without being
asynchronous; 0.19 would use the package nvidia_resiliency_ext."""


class FailedElsewhere(RuntimeError):
    """A read or write failed on another rank, which knows why."""


class FailedOnRank(RuntimeError):
    """A read or write failed on some rank, which may be another one.

    Args:
        rank: where.
        cause: what was raised there.
    """

    def __init__(self, rank: int, cause: BaseException) -> None:
        self.rank = rank
        self.cause = cause
        self.reason = str(cause).removeprefix("Worker failure: ") or type(cause).__name__
        super().__init__(f"rank {rank}: {self.reason}")


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


def save_checkpoint(sharded_state_dict: dict[str, Any], folder: Path) -> None:
    """Write a ``torch_dist`` checkpoint from all ranks, readable by every supported version.

    Args:
        sharded_state_dict: sharded tensors, and plain values that are the same on every rank.
        folder: an existing, empty folder.

    Raises:
        FailedOnRank, FailedElsewhere, CheckpointingException, OSError: from torch, megatron-core and the file
            system.
    """
    from megatron.core import dist_checkpointing

    with _torch_failures_as_exceptions():
        dist_checkpointing.save(sharded_state_dict, str(folder))
    if not COMMON_STATE_IN_FILE and torch.distributed.get_rank() == 0:
        # 0.16 looks for the plain values in this file and nowhere else
        common = dist_checkpointing.load_common_state_dict(str(folder))
        torch.save(common, folder / COMMON_STATE_FILE)


def checksums_of_rank(folder: Path) -> dict[str, Parts]:
    """Checksums of the files that this rank has just written; they are read back from the system's memory."""
    rank = torch.distributed.get_rank()
    written = {
        name: checksums(folder / name, parts)
        for name, parts in shard_ranges(read_metadata(folder)).items()
        if name.startswith(f"__{rank}_")
    }
    if rank == 0:
        written |= {name: checksums(folder / name) for name in WHOLE_FILES}
    return written


def load_checkpoint(sharded_state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read a ``torch_dist`` checkpoint that any supported version wrote, on all ranks.

    The folder may come from anywhere: what is pickled in it is read with unpicklers that run none of its
    code.

    Args:
        sharded_state_dict: which shards to read; their tensors are filled in place.
        folder: the folder that holds ``metadata.json``.

    Returns:
        The loaded tensors under the same keys, and the plain values that were saved.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or refers to anything but checkpoint metadata; or
            a file of shards is missing or shorter than it says.
        FailedOnRank, CheckpointingException, OSError, KeyError, RuntimeError: something else is missing,
            damaged or of another shape.
    """
    from megatron.core import dist_checkpointing

    _check_whole_files(folder)
    metadata = read_metadata(folder)  # refuses what megatron-core would unpickle as it is
    check_shards_are_whole(metadata, folder)
    _check_contents(metadata, folder, sharded_state_dict)
    if not COMMON_STATE_IN_FILE:
        with _torch_failures_as_exceptions(), _restricted_unpickling():
            return dist_checkpointing.load(sharded_state_dict, str(folder))
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    strategy = TorchCommonLoadStrategy()
    with _torch_failures_as_exceptions(), _restricted_unpickling():
        return dist_checkpointing.load(sharded_state_dict, str(folder), common_strategy=strategy)


def _check_whole_files(folder: Path) -> None:
    """The small files beside the shards, whose damage megatron-core meets with whatever exception it causes.

    Raises:
        CheckpointError: names the file.
    """
    if manifest := read_manifest(folder):
        manifest.check_sizes()
        for name in WHOLE_FILES:
            manifest.check_file(name)
    path = folder / BACKEND_FILE
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the checkpoint again") from None
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path} is damaged; copy the checkpoint again") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{path} names the format {backend}; only torch_dist checkpoints can be read")
    path = folder / COMMON_STATE_FILE
    if not path.is_file():
        if not COMMON_STATE_IN_FILE:
            return
        raise CheckpointError(f"{path} is missing; copy the checkpoint again")
    try:
        common = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason}); copy the checkpoint again") from None
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} does not hold values by name; copy the checkpoint again")


def _check_contents(metadata: Metadata, folder: Path, sharded_state_dict: dict[str, Any]) -> None:
    """Hold what is about to be read against the manifest: each rank a share of it, and all agree.

    Raises:
        CheckpointError: on every rank, naming the file.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    manifest = read_manifest(folder)
    if manifest is None:
        return
    keys = [value.key for value in nested_values(sharded_state_dict) if isinstance(value, ShardedBase)]
    asks_for_optimizer = any(key.startswith(_OPTIMIZER) for key in keys)
    ranges = shard_ranges(metadata, skip=() if asks_for_optimizer else (_OPTIMIZER,))
    parts = [(name, *part) for name, every in sorted(ranges.items()) for part in sorted(every)]
    share = sum(length for _, _, length in parts) / torch.distributed.get_world_size()
    rank, before, reason = torch.distributed.get_rank(), 0, None
    try:
        for name, offset, length in parts:
            if share * rank <= before < share * (rank + 1):  # neighbours in a file are read by one rank
                manifest.check_part(name, offset, length)
            before += length
    except (CheckpointError, OSError) as error:
        reason = str(error)
    reasons: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    for said in reasons:
        if said is not None:
            raise CheckpointError(said)


@contextlib.contextmanager
def _torch_failures_as_exceptions() -> Iterator[None]:
    """torch's CheckpointException is no Exception, only a BaseException, and holds the reasons by rank."""
    try:
        yield
    except CheckpointException as error:
        if not error.failures:  # megatron-core tells the reasons of a failed save to rank 0 alone
            raise FailedElsewhere("another rank failed") from error
        rank, (reason, _) = next(iter(error.failures.items()))
        raise FailedOnRank(rank, reason) from error


@contextlib.contextmanager
def _restricted_unpickling() -> Iterator[None]:
    """Every torch.load unpickles tensors and plain values only, as with ``weights_only=True``.

    torch's checkpoint reader asks for ``weights_only=False`` where ``.metadata`` declares an entry to be an
    object; this variable of torch overrules it.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
