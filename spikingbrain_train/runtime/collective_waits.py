"""How long this rank waits for others: the collectives of a block, marked where they begin and end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from spikingbrain_train.runtime.patch import Moment, Patch

_CALLS = (
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "_allgather_base",
    "all_gather_single",
    "allreduce",
    "allreduce_coalesced",
    "all_to_all_single",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Of torch's ProcessGroup, in some release or other."""


@contextmanager
def marked_collectives(mark: Callable[[], Callable[[], None]], *, on_stream: bool) -> Iterator[None]:
    """Within, ``mark`` is called before every wait for a collective, and what it returned after it.

    Under gloo the host waits, in ``Work.wait``. Under NCCL (``on_stream``) the stream does, which that call
    tells it to; and a collective that nobody waits for later may run on the stream itself, at its call.

    Args:
        mark: says that a wait begins, and returns what says that it ends.
        on_stream: whether collectives are work of the device.
    """
    from torch.distributed import ProcessGroup, Work

    with ExitStack() as back:
        _mark(back, Work, "wait", mark)
        for name in _CALLS if on_stream else ():
            if hasattr(ProcessGroup, name):
                _mark(back, ProcessGroup, name, mark)
        yield


def _mark(back: ExitStack, owner: Any, name: str, mark: Callable[[], Callable[[], None]]) -> None:
    whole, thread = getattr(owner, name), threading.get_ident()
    # Not `whole`: what torch's classes have there becomes a method of their objects, and that does not.
    own = vars(owner).get(name)

    def marked(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() != thread:  # copies to other hosts, beside the steps
            return whole(*arguments, **options)
        end = mark()
        try:
            return whole(*arguments, **options)
        finally:
            end()

    setattr(owner, name, marked)
    if own is None:
        back.callback(delattr, owner, name)
    else:
        back.callback(setattr, owner, name, own)


PATCHES = (
    Patch(
        name="marked_collectives",
        changes="torch.distributed.Work.wait and, on GPUs, collectives of ProcessGroup, in measured steps",
        reason="ranks that wait for a slow one take as long as it does, so that nothing tells it from them",
        apply=marked_collectives,
        moment=Moment.using,
    ),
)
