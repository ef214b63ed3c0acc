"""The parts of a step: ranges for torch's profiler around a run's modules while it is profiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.profiler import record_function

from spikingbrain_train.architecture.branches import branch_names, module_name
from spikingbrain_train.architecture.layers import Layer
from spikingbrain_train.architecture.layers import layers as layers_of
from spikingbrain_train.runtime.collective_waits import marked_collectives
from spikingbrain_train.training.parallel_chunks import parallel_chunks

if TYPE_CHECKING:
    from spikingbrain_train.training.trainer import Trainer

RANGE = "part: "
"""What the name of a range begins with."""
DATA, EMBEDDING, NORMS, TRANSFORMS = "waiting for data", "embedding", "norms", "spikes and other transforms"
OUTPUT, TEACHER, OPTIMIZER, GRADIENTS = "output and loss", "teacher", "optimizer", "sums of gradients"
COMMUNICATION, REST = "communication", "rest"
_OF_EXPERTS = {"router": "router", "experts": "experts", "shared_experts": "shared experts"}
"""Modules of megatron-core's MoELayer; what it does beside them is sending tokens to experts and back."""


@contextmanager
def ranges_of(trainer: Trainer) -> Iterator[None]:
    """While it lasts, every part of the trainer's steps runs inside a range of its name.

    Ranges inside one another (a norm inside a mixer) are told apart by who looks at the events: the innermost
    counts. Nothing else of a run is changed, and nothing is left behind.
    """
    undo: list[Callable[[], None]] = []
    teacher = getattr(trainer.stage, "teacher", None)
    # Under gloo the host waits for others; on GPUs the kernels of collectives say how long they take.
    with marked_collectives(_waiting, on_stream=False):
        try:
            for chunk in parallel_chunks(trainer.model):
                _mark_model(_unwrapped(chunk), trainer, undo)
                _mark(chunk.config, "finalize_model_grads_func", GRADIENTS, undo)
            _mark(trainer.engine, "update_weights", OPTIMIZER, undo)
            for chunk in () if teacher is None else teacher.chunks:
                _mark(chunk, "forward", TEACHER, undo)
            yield
        finally:
            for each in reversed(undo):
                each()


def _waiting() -> Callable[[], None]:
    waits = record_function(RANGE + COMMUNICATION)
    waits.__enter__()
    return lambda: waits.__exit__(None, None, None)


def loaded(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches, each waited for inside the range of the data."""
    while True:
        with record_function(RANGE + DATA):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _mark_model(model: Any, trainer: Trainer, undo: list[Callable[[], None]]) -> None:
    for name in ("embedding", "sink_embedding"):
        if getattr(model, name, None) is not None:
            _mark(getattr(model, name), "forward", EMBEDDING, undo)
    if model.post_process:
        _mark(model, "_postprocess", OUTPUT, undo)
    kinds = layers_of(trainer.config.model)
    for layer in model.layers:
        # megatron-core counts the layers of all stages, from 1
        _mark_layer(layer, kinds[layer.layer_number - 1], undo)
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            _mark(module, "forward", NORMS, undo)
        for transform in getattr(module, "transforms", {}).values():
            for method in ("input", "weight", "output"):
                _mark(transform, method, TRANSFORMS, undo)


def _mark_layer(layer: Any, kind: Layer, undo: list[Callable[[], None]]) -> None:
    mixer, feed_forward = layer.self_attention, f"feed-forward {kind.feed_forward.name}"
    _mark(mixer, "forward", f"mixer {kind.mixer_name}", undo)
    if len(kind.mixers) > 1:
        for branch, name in zip(kind.mixers, branch_names(kind.mixers), strict=True):
            _mark(getattr(mixer, module_name(name)), "forward", f"mixer {branch.name}", undo)
    _mark(layer.mlp, "forward", feed_forward, undo)
    for name, what in _OF_EXPERTS.items():
        _mark(getattr(layer.mlp, name, None), "forward", f"{feed_forward}: {what}", undo)


def _mark(owner: Any, method: str, part: str, undo: list[Callable[[], None]]) -> None:
    """Lay a range around an object's own method; its class, and other objects of it, keep theirs."""
    function = getattr(owner, method, None)
    if function is None:
        return
    had = vars(owner).get(method)

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + part):
            return function(*args, **kwargs)

    def restore() -> None:
        if had is None:
            delattr(owner, method)
        else:
            object.__setattr__(owner, method, had)

    object.__setattr__(owner, method, ranged)
    undo.append(restore)
