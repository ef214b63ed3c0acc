"""Cross entropy on held-out text, with the model in training topology."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from spikingbrain_train.data.loader import MicroBatch
from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.models.gpt_model import HybridGPTModel
from spikingbrain_train.parallel.process_groups import ProcessGroups


class HeldOutCrossEntropy(Evaluator):
    """``valid/cross_entropy``, in nats per token, of the data that ``data.valid`` names."""

    def applies(self, run: EvaluatedRun) -> bool:
        return run.held_out is not None

    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        assert run.held_out is not None
        stage, num_batches = run.config.stage, run.held_out.num_batches
        with run.activity("evaluating", num_batches, "batches") as progress:
            cross_entropy = held_out_cross_entropy(
                run.model,
                progress.over(run.held_out.batches()),
                num_batches,
                seq_length=stage.seq_length,
                micro_batch_size=stage.micro_batch_size,
                groups=run.groups,
            )
        return {"valid/cross_entropy": cross_entropy}


def held_out_cross_entropy(
    model: HybridGPTModel,
    batches: Iterator[MicroBatch],
    num_batches: int,
    *,
    seq_length: int,
    micro_batch_size: int,
    groups: ProcessGroups,
) -> float:
    """Mean cross entropy over every unmasked token.

    Args:
        model: this rank's pipeline stage.
        batches: this data-parallel rank's micro-batches, on its device.
        num_batches: how many to take; the same on every rank.
        seq_length: tokens of text of a sequence.
        micro_batch_size: sequences of a micro-batch.
        groups: process groups.

    Returns:
        Nats per token, the same on every rank.
    """

    def forward_step(iterator: Iterator[MicroBatch], stage: HybridGPTModel):
        batch = next(iterator)
        output = stage(batch.tokens, batch.labels, batch.loss_mask, layout=batch.layout)
        mask = batch.loss_mask.flatten()

        def count(result):
            total, losses = result
            report = torch.stack([mask.sum(), losses.cross_entropy @ mask]).double()
            return total, mask.sum().to(torch.int), report

        return output, count

    num_sink_tokens = model.model_config.num_sink_tokens
    was_training = model.training
    model.eval()
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=num_batches,
            seq_length=seq_length + num_sink_tokens,
            micro_batch_size=micro_batch_size,
            forward_only=True,
        )
    model.train(was_training)
    sums = sum(reports) if reports else torch.zeros(2, dtype=torch.float64, device=groups.device)
    tokens, cross_entropy = groups.sum_from_last_stage(sums).tolist()
    return cross_entropy / tokens
