"""How much memory tensors take while a body runs, as torch's own dispatcher sees them come and go."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from spikingbrain_train.parallel.own_part import own_part

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators made and that are still alive, in ``live`` and at most in ``peak``.

    Views share a storage and count once; of what FSDP2 spreads this rank's part does, and of what it gathers
    what is not freed. What a kernel needs while it runs (workspaces) is not seen, as it is
    not in the planner's estimate. So products of bfloat16 may be computed in float32, which on a CPU without
    the instructions takes a thirtieth of the time; what they return is of the same size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = _computed(func, args, kwargs or {})
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._see(own_part(value).untyped_storage())
        return result

    def __enter__(self) -> LiveBytes:
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            if id(storage) in self._known:
                self._count(id(storage), size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*arguments)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known or storage.device.type == "meta":
            return
        self._known[key] = 0
        self._count(key, storage.nbytes())
        weakref.finalize(storage, self._gone, key)

    def _count(self, key: int, size: int) -> None:
        self.live += size - self._known[key]
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func not in _PRODUCTS or all(each.dtype is not torch.bfloat16 for each in args[:2]):
        return func(*args, **kwargs)
    wide = tree_map_only(torch.Tensor, torch.Tensor.float, args)
    return func(*wide, **kwargs).to(torch.bfloat16)
