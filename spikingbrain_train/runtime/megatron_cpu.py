"""What makes megatron-core train over gloo on a machine without GPUs.

megatron-core is written for CUDA. Each entry of :data:`PATCHES` names one thing that it assumes, what is put
in its place, and why; none of them is applied on a GPU. Valid for megatron-core 0.16.1 to 0.19.x.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from spikingbrain_train.runtime.host_torch import RebindOnImport, rebind_loaded_modules
from spikingbrain_train.runtime.patch import ON_CPU, Patch

PATCHES: list[Patch] = []


def _patch(changes: str, reason: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(install: Callable[[], None]) -> Callable[[], None]:
        PATCHES.append(Patch(install.__name__.strip("_"), changes, reason, install, ON_CPU))
        return install

    return register


def _megatron_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if module is not None and name.startswith("megatron.core"):
            yield module


def _replace_everywhere(old: Any, new: Any) -> None:
    """Rebind a function in every megatron module that imported it by name."""
    for module in _megatron_modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


@_patch(
    changes="torch.compile around megatron's small fused functions (megatron.core.jit.jit_fuser)",
    reason="on CPU it needs a C++ compiler on the user's machine and seconds of compilation for no gain",
)
def _no_compiled_fusions() -> None:
    from megatron.core import jit

    jit.disable_jit_fuser()  # for modules imported from now on
    for module in _megatron_modules():
        jitted = [(name, value) for name, value in vars(module).items() if _is_compiled(value)]
        for name, value in jitted:
            setattr(module, name, value._torchdynamo_orig_callable)
        for owner in [
            v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__
        ]:
            for name, value in [item for item in vars(owner).items() if _is_compiled(item[1])]:
                setattr(owner, name, value._torchdynamo_orig_callable)


def _is_compiled(value: Any) -> bool:
    return callable(value) and "_torchdynamo_orig_callable" in getattr(value, "__dict__", {})


@_patch(
    changes="the name torch inside megatron's modules, those imported later too (host_torch.HOST_TORCH)",
    reason='factories get device="cuda"; torch.cuda supplies current_device, synchronize, streams and seeds',
)
def _torch_namespace() -> None:
    import megatron.core  # noqa: F401  (the package must be there before its modules are looked through)

    sys.meta_path.insert(0, RebindOnImport("megatron"))
    rebind_loaded_modules("megatron")


@_patch(
    changes="torch.Tensor.cuda returns the tensor itself",
    reason="tied embeddings under pipeline parallelism and checkpoint exchange call .cuda() on tensors",
)
def _tensor_cuda_method() -> None:
    def cuda(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]


@_patch(
    changes="tensor_parallel.random._get/_set_cuda_rng_state use the CPU generator; one warning is filtered",
    reason="the model-parallel RNG tracker and activation recomputation fork and restore the GPU's "
    "generator; the warning says that the CPU generator moved inside such a fork, which here is the purpose",
)
def _rng_states() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


@_patch(
    changes="the tensor types that Float16Module converts (_FLOAT_TYPES and siblings of transformer.module)",
    reason="isinstance(x, torch.cuda.HalfTensor) raises where CUDA is missing",
)
def _float_type_tuples() -> None:
    from megatron.core.transformer import module

    module._FLOAT_TYPES = (torch.FloatTensor,)
    module._HALF_TYPES = (torch.HalfTensor,)
    module._BF16_TYPES = (torch.BFloat16Tensor,)


@_patch(
    changes="Tensor.type() says torch.cuda.* inside gradient clipping and two optimizers' constructors",
    reason="they recognise parameters and gradients by names such as 'torch.cuda.FloatTensor'",
)
def _tensor_type_names() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    clip = clip_grads.clip_grad_by_total_norm_fp32
    _replace_everywhere(clip, _with_cuda_type_names(clip))
    for owner in (optimizer.Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        owner.__init__ = _with_cuda_type_names(owner.__init__)


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    if "type" in vars(torch.Tensor):  # already active: an optimizer's constructor calls its parent's
        yield
        return
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.type  # the inherited method shows again


@_patch(
    changes="moe_utils.maybe_move_tensor_to_cpu turns tensors that already are on the CPU into NumPy arrays",
    reason="the all-to-all dispatcher asks for split sizes as arrays while it copies them from the GPU; left "
    "as tensors they are refused by all_to_all_single",
)
def _split_sizes_as_arrays() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: F401  (it imports the name)

    move = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(move)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace_everywhere(move, maybe_move_tensor_to_cpu)


@_patch(
    changes="tensor_parallel.mappings._gather_along_first_dim and _reduce_scatter_along_first_dim pad pieces "
    "of different lengths to the longest",
    reason="experts that are split over tensor-parallel ranks gather tokens in pieces of different lengths, "
    "which gloo refuses",
)
def _collectives_of_uneven_pieces() -> None:
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_pieces(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, use_global_buffer=use_global_buffer)
        longest = max(1, *output_split_sizes)
        pieces = gather(_padded(input_, longest), group).split(longest)
        return torch.cat([piece[:size] for piece, size in zip(pieces, output_split_sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_pieces(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, use_global_buffer=use_global_buffer)
        longest = max(1, *input_split_sizes)
        pieces = torch.cat([_padded(piece, longest) for piece in input_.split(input_split_sizes)])
        return reduce_scatter(pieces, group)[: input_split_sizes[group.rank()]]

    _replace_everywhere(gather, gather_pieces)
    _replace_everywhere(reduce_scatter, reduce_scatter_pieces)


def _padded(rows: torch.Tensor, number: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, number - rows.shape[0]))
