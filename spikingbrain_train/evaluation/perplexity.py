"""Held-out cross entropy of a Hugging Face model, over the same windows as training's own evaluation.

The independent check of an export: transformers' model, transformers' weights, only the windows are ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from spikingbrain_train.data.gpt_dataset import HeldOutSamples
from spikingbrain_train.evaluation.evaluator import HeldOutDataset
from spikingbrain_train.evaluation.position_logits import PositionLogits
from spikingbrain_train.evaluation.result import DatasetLoss, Perplexity
from spikingbrain_train.reporting.activity import activity


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel,
    dataset: HeldOutSamples,
    datasets: Sequence[HeldOutDataset] = (),
    *,
    progress: bool = False,
) -> Perplexity:
    """Mean cross entropy over every unmasked label of ``dataset``, one window at a time.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        dataset: held-out windows, at least one.
        datasets: what they are of, in order; each is measured by itself, too.
        progress: say on standard error how far it is.
    """
    logits_of = PositionLogits(model)
    totals = torch.zeros(max(1, len(datasets)), dtype=torch.float64)
    tokens = torch.zeros_like(totals)
    started = time.perf_counter()
    with activity("evaluating", len(dataset), "windows", shown=progress) as done:
        for index in done.over(range(len(dataset))):
            sample = dataset[index]
            losses = _losses(logits_of, sample["tokens"].to(model.device), sample["labels"].to(model.device))
            # Not a product: 0 * inf would be NaN.
            counted = losses[sample["loss_mask"] > 0]
            which = int(sample["dataset"]) if len(datasets) > 1 else 0
            totals[which] += counted.double().sum()
            tokens[which] += counted.numel()
    return Perplexity(
        cross_entropy=(totals.sum() / tokens.sum()).item(),
        windows=len(dataset),
        seq_length=dataset.seq_length,
        tokens=int(tokens.sum()),
        seconds=time.perf_counter() - started,
        datasets=[
            DatasetLoss(each.name, each.prefix, int(count), (total / count).item() if count else None)
            for each, total, count in zip(datasets, totals, tokens, strict=False)
        ],
    )


def _losses(logits_of: PositionLogits, tokens_T: Tensor, labels_T: Tensor) -> Tensor:
    """Cross entropy [T] float32, on the CPU, of labels given the tokens up to each position."""
    positions_T = torch.arange(len(tokens_T), device=tokens_T.device)
    chunks = logits_of(tokens_T.unsqueeze(0), torch.zeros_like(positions_T), positions_T)
    losses = [F.cross_entropy(logits, labels_T[chunk], reduction="none") for chunk, logits in chunks]
    return torch.cat(losses).cpu()
