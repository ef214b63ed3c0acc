"""Cross entropy on held-out text, with the model in training topology."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.parallel.forward_passes import pass_forward
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.progress import Shown


class HeldOutCrossEntropy(Evaluator):
    """``valid/cross_entropy``, in nats per token, of the data that ``data.valid`` names.

    Where it names several datasets also ``valid/cross_entropy/<name>`` of each that an evaluation reads.
    """

    shown = {"valid/cross_entropy": Shown("held-out CE", "{:.4f}")}

    def applies(self, run: EvaluatedRun) -> bool:
        return run.held_out is not None

    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        assert run.held_out is not None
        stage, num_batches, datasets = run.config.stage, run.held_out.num_batches, run.held_out.datasets
        with run.activity("evaluating", num_batches, "batches") as progress:
            found = held_out_cross_entropy(
                run.model,
                progress.over(run.held_out.batches()),
                num_batches,
                seq_length=stage.seq_length,
                micro_batch_size=stage.micro_batch_size,
                groups=run.groups,
                num_datasets=len(datasets),
            )
        of_datasets = {
            f"valid/cross_entropy/{dataset.name}": value
            for dataset, value in zip(datasets, found.by_dataset, strict=False)
            if value is not None
        }
        return {"valid/cross_entropy": found.mean, **of_datasets}


@dataclass(frozen=True)
class HeldOutLosses:
    """Cross entropies in nats per token, the same on every rank."""

    mean: float
    """Over all tokens."""
    by_dataset: list[float | None]
    """Over those of each of several datasets, None where nothing of it was read; empty for one."""


def held_out_cross_entropy(
    model: HybridGPTModel | ModelChunks,
    batches: Iterator[MicroBatch],
    num_batches: int,
    *,
    seq_length: int,
    micro_batch_size: int,
    groups: ProcessGroups,
    num_datasets: int = 1,
) -> HeldOutLosses:
    """Mean cross entropy over every unmasked token.

    Args:
        model: this rank's pipeline stage, or its virtual ones.
        batches: this data-parallel rank's micro-batches, on its device.
        num_batches: how many to take; the same on every rank.
        seq_length: tokens of text of a sequence.
        micro_batch_size: sequences of a micro-batch.
        groups: process groups.
        num_datasets: of which the micro-batches tell their sequences.
    """
    several = num_datasets > 1

    def forward_step(iterator: Iterator[MicroBatch], stage: HybridGPTModel):
        batch = next(iterator)
        output = stage(batch.tokens, batch.labels, batch.loss_mask, layout=batch.layout)
        mask = batch.loss_mask.flatten()

        def count(result):
            total, losses = result
            report = torch.stack([mask.sum(), losses.cross_entropy @ mask]).double()
            if several:
                parts = _sums_by_dataset(losses.cross_entropy, batch, num_datasets)
                report = torch.cat((report, parts.flatten()))
            return total, mask.sum().to(torch.int), report

        return output, count

    num_sink_tokens = model.model_config.num_sink_tokens
    was_training = model.training
    model.eval()
    with torch.no_grad():
        reports = pass_forward(
            model.chunks,
            forward_step,
            batches,
            num_batches,
            seq_length=seq_length + num_sink_tokens,
            micro_batch_size=micro_batch_size,
        )
    model.train(was_training)
    size = 2 + 2 * num_datasets * several
    sums = sum(reports) if reports else torch.zeros(size, dtype=torch.float64, device=groups.device)
    tokens, cross_entropy, *parts = groups.sum_from_last_stage(sums).tolist()
    of_datasets = zip(parts[:num_datasets], parts[num_datasets:], strict=True)
    return HeldOutLosses(
        cross_entropy / tokens, [total / count if count else None for count, total in of_datasets]
    )


def _sums_by_dataset(cross_entropy: Tensor, batch: MicroBatch, num_datasets: int) -> Tensor:
    """Tokens and their cross entropy of each dataset: [2, num_datasets] float64.

    Args:
        cross_entropy: [B * T] of the tokens of ``batch``.
        batch: which knows the datasets of its sequences.
        num_datasets: their number.
    """
    assert batch.datasets is not None
    mask = batch.loss_mask.double()
    sequences = torch.stack([mask.sum(1), (cross_entropy.view_as(mask) * mask).sum(1)])
    return sequences.new_zeros(2, num_datasets).index_add_(1, batch.datasets, sequences)
