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

from spikingbrain_train.data.gpt_dataset import ValidDataset
from spikingbrain_train.evaluation.evaluator import HeldOutDataset
from spikingbrain_train.evaluation.result import DatasetLoss, Perplexity
from spikingbrain_train.reporting.activity import activity

_LOGIT_BYTES = 256 << 20
"""Memory for the float32 logits of one chunk of positions."""


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel,
    dataset: ValidDataset,
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
    losses_of = _CausalLosses(model)
    totals = torch.zeros(max(1, len(datasets)), dtype=torch.float64)
    tokens = torch.zeros_like(totals)
    started = time.perf_counter()
    with activity("evaluating", len(dataset), "windows", shown=progress) as done:
        for index in done.over(range(len(dataset))):
            sample = dataset[index]
            losses = losses_of(sample["tokens"].to(model.device), sample["labels"].to(model.device)).cpu()
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


class _CausalLosses:
    """Per-token losses of one window, without the float32 logits of all its positions at once.

    The decoder runs once; the output embedding is applied to chunks of its hidden states. Models that do
    more to their logits (scaling, soft-capping) are found out on a few tokens, and run whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        probe = torch.arange(8, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
        logits = model(input_ids=probe, use_cache=False).logits
        self.chunked = self.head is not None and torch.equal(self.head(self._hidden(probe)), logits)

    def __call__(self, tokens_T: Tensor, labels_T: Tensor) -> Tensor:
        """Cross entropy [T] float32 of ``labels_T`` given the tokens up to each position."""
        if not self.chunked:
            logits_TV = self.model(input_ids=tokens_T.unsqueeze(0), use_cache=False).logits[0]
            return F.cross_entropy(logits_TV.float(), labels_T, reduction="none")
        hidden_TD = self._hidden(tokens_T.unsqueeze(0))[0]
        positions = max(1, _LOGIT_BYTES // (4 * self.head.weight.shape[0]))
        return torch.cat(
            [
                F.cross_entropy(self.head(hidden).float(), labels, reduction="none")
                for hidden, labels in zip(hidden_TD.split(positions), labels_T.split(positions), strict=True)
            ]
        )

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        return self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
