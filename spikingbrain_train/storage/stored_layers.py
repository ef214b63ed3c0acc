"""How many layers a folder's configuration claims, held against the tensors that lie beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from spikingbrain_train.errors import CheckpointError

_MANY_LAYERS = 1000
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def check_number_of_layers(setting: str, number: object, tensors: Callable[[], Iterable[str]]) -> None:
    """Hold a claimed number of layers against stored tensors, before anything is listed for each.

    Small numbers pass: the tensor that is missing then says more.

    Args:
        setting: what claims it, for the message (``config.json: num_hidden_layers``).
        number: the claim; anything but a whole number passes, too.
        tensors: gives names such as ``model.layers.3.mlp.up_proj.weight``; asked for large numbers only.

    Raises:
        CheckpointError: there are tensors of fewer layers.
    """
    if not isinstance(number, int) or number <= _MANY_LAYERS:
        return
    stored = 1 + max((int(match[1]) for match in map(_LAYER.search, tensors()) if match), default=-1)
    if number > stored:
        raise CheckpointError(
            f"{setting} = {number}, but the tensors are of {stored} layers; take both from the same model"
        )
