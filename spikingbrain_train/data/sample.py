"""One sample of training or evaluation."""

from __future__ import annotations

import numpy as np
import torch

Sample = dict[str, torch.Tensor]
"""tokens [seq_length] int64; labels [seq_length] int64, the token that follows each; loss_mask [seq_length]
float32, 0 where a label is padding. Where documents are kept apart also cu_seqlens [documents + 1] int64,
from 0 to seq_length, and loss_mask is 0 where the label is the first token of another document. Of several
held-out datasets dataset [] int64, the number of the one that it is of."""


def sample_of(window: np.ndarray, loss_mask: np.ndarray, starts: np.ndarray | None) -> Sample:
    """A window of tokens as a sample.

    Args:
        window: [seq_length + 1] int64; the last one is only a label.
        loss_mask: [seq_length] float32, which is changed.
        starts: where in the window documents begin, after its first token; None does not keep them apart.
    """
    tokens = torch.from_numpy(window)
    sample = {"tokens": tokens[:-1].clone(), "labels": tokens[1:].clone()}
    if starts is not None:
        length = len(loss_mask)
        loss_mask[starts - 1] = 0.0
        sample["cu_seqlens"] = torch.from_numpy(np.concatenate(([0], starts[starts < length], [length])))
    return {**sample, "loss_mask": torch.from_numpy(loss_mask)}
