"""Building a model on torch's meta device, in process groups that talk to nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spikingbrain_train.runtime.patch import Moment, Patch


@contextmanager
def without_all_reduce() -> Iterator[None]:
    """No rank adds up anything within."""
    import torch

    all_reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        torch.distributed.all_reduce = all_reduce


PATCHES = (
    Patch(
        name="without_all_reduce",
        changes="torch.distributed.all_reduce does nothing while a dry run builds a rank's share",
        reason="megatron-core adds up tied vocabulary matrices of the first and last stage, which torch 2.6 "
        "cannot do on the meta device, not even in a group that talks to nobody",
        apply=without_all_reduce,
        moment=Moment.using,
    ),
)
