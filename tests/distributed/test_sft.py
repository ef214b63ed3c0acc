"""Supervised fine-tuning: packed examples learn as single rows do, the same on every topology, and resume.

Tolerances of 1e-5 relative as in test_training_topologies.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch

from spikingbrain_train.config.linear_transforms import Projection, QuantizationConfig
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import LongExamples, SparsityConfig, StageConfig
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.data.loader import collate, local_micro_batch
from spikingbrain_train.data.packed_examples import PackedExamples
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.adapted import assert_only_adapters_changed
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, ByteTokenizer, checkpoint_config, run_config, train
from tests.distributed.test_bad_batches import _train as _train_with_bad_batches
from tests.distributed.test_resume import _interrupt_after

LENGTH = 64
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Examples of one token a byte, of very unequal shares of loss."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "staging").mkdir()
    tokenizer = ByteTokenizer()
    writer = IndexedDatasetWriter(folder / "d", tokenizer, folder / "staging", with_loss_mask=True)
    lines = [line.strip() for line in topics["assignment"].splitlines() if len(line.strip()) > 10]
    for number, line in enumerate(lines[:60]):
        ids = np.asarray(tokenizer.encode(line[: 12 + number % 50]), dtype=writer.dtype)
        loss = np.zeros(len(ids), dtype=bool)
        loss[-1 - number % 9 :] = True
        writer.add_document(ids, len(ids), loss)
    writer.finish()
    writer.publish()
    return str(folder / "d")


def _token_losses(
    groups: ProcessGroups, config: RunConfig, prefix: str
) -> dict[int, list[tuple[int, float]]]:
    """Of this rank's tokens with loss, packed and alone: their key and cross entropy."""
    from spikingbrain_train.training.trainer import Trainer

    trainer = Trainer(config, groups, [])
    model = trainer.model.eval()
    found: dict[int, list[tuple[int, float]]] = {}
    for alone in (False, True):
        data = PackedExamples(prefix, LENGTH, LongExamples.truncate, alone=alone)
        found[int(alone)] = []
        for number in range(data.windows_per_epoch):
            sample = data.sample(number)
            # Labels of one example count up where it begins: its number and the place in it.
            bounds = sample["cu_seqlens"].tolist()
            keys = torch.zeros(LENGTH, dtype=torch.long)
            for example, begin, end in zip(data.examples(number), bounds[:-1], bounds[1:], strict=False):
                keys[begin:end] = 1000 * int(example) + torch.arange(end - begin)
            whole: Any = collate([sample])
            split = {
                "context_parallel_rank": groups.context_parallel_rank,
                "context_parallel_size": groups.context_parallel_size,
            }
            batch = local_micro_batch(whole, groups.device, **split)
            with torch.no_grad():
                _, losses = model(batch.tokens, batch.labels, batch.loss_mask, layout=batch.layout)
            text = batch.layout.text_range()
            kept = batch.loss_mask.flatten() > 0
            local = keys[text.start : text.stop][kept].tolist()
            found[int(alone)] += zip(local, losses.cross_entropy[kept].tolist(), strict=True)
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_packing_changes_no_loss_of_a_token(
    ranks: RankPool, tmp_path: Path, chats: str, hybrid_checkpoint: Path, size: int
) -> None:
    parallel = ParallelConfig(context_parallel_size=size)
    config = _config(tmp_path / "run", chats, hybrid_checkpoint, parallel)
    results = ranks.run(_token_losses, config, chats, world_size=size, parallel=parallel)
    packed, alone = (dict(pair for rank in results for pair in rank[kind]) for kind in (0, 1))
    assert packed.keys() == alone.keys() and len(packed) > 200
    for key, loss in alone.items():
        assert packed[key] == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)


def _config(
    folder: Path, chats: str, checkpoint: Path, parallel: ParallelConfig, model: Any = MODEL
) -> RunConfig:
    config = run_config(
        folder, Path(chats), model=model, parallel=parallel, checkpoint=checkpoint_config(checkpoint)
    )
    config.data.valid, config.checkpoint.save_interval = [chats], 2
    config.stage = StageConfig(
        kind="sft", train_iters=4, seq_length=LENGTH, global_batch_size=4, micro_batch_size=1
    )
    return config


TOPOLOGIES = {
    "TP 2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP 2": ParallelConfig(pipeline_model_parallel_size=2),
    "PP 2 of 2 virtual stages": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "CP 2": ParallelConfig(context_parallel_size=2),
    "DP 2": ParallelConfig(use_distributed_optimizer=True),
    "EP 2": ParallelConfig(expert_model_parallel_size=2),
}
ONE_RANK = ParallelConfig()


def _train(
    ranks: RankPool, folder: Path, chats: str, checkpoint: Path, parallel: ParallelConfig, model: Any
) -> tuple[list[tuple[float, float]], list[float]]:
    """Loss and gradient norm of every step, and the held-out cross entropies."""
    world = 1 if parallel == ONE_RANK else 2
    config = _config(folder, chats, checkpoint, parallel, model)
    steps, *_ = ranks.run(train, config, world_size=world, parallel=parallel)
    held_out = [
        point["valid/cross_entropy"] for point in read_metrics(folder) if "valid/cross_entropy" in point
    ]
    return steps, held_out


@pytest.fixture(scope="module")
def one_rank(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    chats: str,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
) -> dict[str, Any]:
    """Both models on one rank, where they start, and the runs themselves."""
    found = {}
    for name, checkpoint, model in (
        ("7B", hybrid_checkpoint, MODEL),
        ("76B", hybrid_76b_checkpoint, MODEL_76B),
    ):
        folder = tmp_path_factory.mktemp("one_rank")
        found[name] = (folder, checkpoint, model, _train(ranks, folder, chats, checkpoint, ONE_RANK, model))
    return found


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_gives_the_same_numbers(
    ranks: RankPool, tmp_path: Path, chats: str, one_rank: dict[str, Any], name: str
) -> None:
    _, checkpoint, model, (expected, held_out) = one_rank["76B" if name == "EP 2" else "7B"]
    steps, held_out_here = _train(ranks, tmp_path / "run", chats, checkpoint, TOPOLOGIES[name], model)
    assert len(steps) == 4 and expected[-1][0] < expected[0][0]
    np.testing.assert_allclose(steps, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(held_out_here, held_out, rtol=TOLERANCE)


def test_the_mean_is_over_tokens_with_loss_of_the_whole_batch(
    ranks: RankPool, tmp_path: Path, chats: str, one_rank: dict[str, Any]
) -> None:
    """In a first step without an update, against single rows of the same examples."""
    _, checkpoint, _, (expected, _) = one_rank["7B"]
    config = _config(tmp_path / "run", chats, checkpoint, ONE_RANK)
    (found,) = ranks.run(_token_losses, config, chats, world_size=1, parallel=ONE_RANK)
    alone = dict(found[1])
    data = PackedExamples(chats, LENGTH, LongExamples.truncate, seed=(config.seed, 0))
    batch = {int(example) for number in range(4) for example in data.examples(number)}
    losses = [loss for key, loss in alone.items() if key // 1000 in batch]
    shares = [sum(key // 1000 in data.examples(number) for key in alone) for number in range(4)]
    assert max(shares) > min(shares), "ranks of DP 2 would have unequal numbers"
    assert expected[0][0] == pytest.approx(np.mean(losses), rel=TOLERANCE)


def test_losses_of_routers_weigh_as_in_pretraining(one_rank: dict[str, Any]) -> None:
    """However few tokens carry loss: as their mean over the tokens that are routed, sinks on top."""
    folder, *_ = one_rank["76B"]
    points = [point for point in read_metrics(folder) if "moe/aux_loss" in point]
    assert len(points) == 4
    layers = MODEL_76B.num_layers / 2  # feed_forwards=[dense, moe]
    routed = (LENGTH + MODEL_76B.num_sink_tokens) / LENGTH
    for point in points:
        mean = MODEL_76B.moe.aux_loss_coeff * point["moe/aux_loss"]
        mean += MODEL_76B.moe.z_loss_coeff * point["moe/z_loss"]
        found = point["train/loss"] - point["train/cross_entropy"]
        assert found == pytest.approx(layers * mean * routed, rel=1e-4)  # a difference of float32 numbers


def _train_measuring(groups: ProcessGroups, config: RunConfig) -> list[tuple[float, float]]:
    """Of every step: mean magnitude of products of all tokens, summed over layers, and the L1 loss."""
    from spikingbrain_train.models.feed_forwards.gated_activation import activations_in
    from spikingbrain_train.training.trainer import Trainer

    class Measure(Callback):
        found: list[tuple[float, float]] = []

        def start(self) -> None:
            for each in activations_in(self.run.state.model):
                each.register_forward_hook(self._add)

        def step_begin(self) -> None:
            self.sum = 0.0

        def _add(self, module: Any, inputs: Any, product: torch.Tensor) -> None:
            if product.requires_grad:
                self.sum += product.detach().double().abs().mean(-1).sum().item()

        def report_due(self, report: Any) -> None:
            tokens = config.stage.global_batch_size * config.stage.seq_length
            self.found.append((self.sum / tokens, report.metrics["train/l1_loss"]))

    measure = Measure()
    Trainer(config, groups, [measure]).train()
    return measure.found


def test_the_loss_inside_feed_forwards_weighs_as_in_pretraining(
    ranks: RankPool, tmp_path: Path, chats: str, hybrid_checkpoint: Path
) -> None:
    """However few tokens carry loss: its factor times the mean over all tokens of the batch."""
    relu = replace(MODEL, activation_func=ActivationFunc.relu)
    config = _config(tmp_path, chats, hybrid_checkpoint, ONE_RANK, relu)
    config.stage.sparsity = SparsityConfig([0.5], [4])
    (found,) = ranks.run(_train_measuring, config, world_size=1, parallel=ONE_RANK)
    assert len(found) == 4
    for magnitude, loss in found:
        assert loss == pytest.approx(0.5 * magnitude, rel=TOLERANCE) and magnitude > 0


def test_a_run_that_was_interrupted_ends_bit_for_bit_the_same(
    ranks: RankPool, tmp_path: Path, chats: str, one_rank: dict[str, Any]
) -> None:
    folder, checkpoint, _, (expected, _) = one_rank["7B"]
    config = _config(tmp_path / "run", chats, checkpoint, ONE_RANK)
    _interrupt_after(shutil.copytree(folder, tmp_path / "run"), 2)
    (rest,) = ranks.run(train, config, world_size=1, parallel=ONE_RANK)
    assert rest == expected[2:]


def test_adapters_alone_learn_answers(
    ranks: RankPool, tmp_path: Path, chats: str, hybrid_checkpoint: Path
) -> None:
    """The same on two tensor-parallel ranks, at 1e-5 of four steps of AdamW."""
    model = replace(MODEL, lora=LoraConfig(names=["chat"], ranks=[2]))
    found = []
    for name, size in (("one", 1), ("two", 2)):
        parallel = TOPOLOGIES["TP 2"] if size == 2 else ONE_RANK
        config = _config(tmp_path / name, chats, hybrid_checkpoint, parallel, model)
        found.append(ranks.run(train, config, world_size=size, parallel=parallel)[0])
        assert_only_adapters_changed(hybrid_checkpoint, tmp_path / name / "checkpoints")
    assert found[0][-1][0] < found[0][0][0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=0)


def test_weights_anneal_to_int8_numbers(
    ranks: RankPool, tmp_path: Path, chats: str, hybrid_checkpoint: Path
) -> None:
    quantization = QuantizationConfig(list(Projection), group_size=16, keys_and_values=True)
    model = replace(MODEL, quantization=quantization)
    config = _config(tmp_path, chats, hybrid_checkpoint, ONE_RANK, model)
    config.stage.quantization_annealing.anneal_iters = 2
    (steps,) = ranks.run(train, config, world_size=1, parallel=ONE_RANK)
    points = read_metrics(tmp_path)
    assert [p["quantization/share"] for p in points if "train/loss" in p] == [0.0, 0.5, 1.0, 1.0]
    assert all(0 < p["quantization/weight_error"] < 0.02 for p in points if "valid/cross_entropy" in p)
    assert steps[-1][0] < steps[0][0]


def test_a_bad_batch_of_examples_split_over_ranks_changes_nothing_and_is_written_down(
    ranks: RankPool, tmp_path: Path, chats: str, hybrid_checkpoint: Path
) -> None:
    """Step 2 reads a NaN, and a gradient of step 3 is one; both ranks hold a part of every example."""
    parallel = ParallelConfig(context_parallel_size=2)
    config = _config(tmp_path, chats, hybrid_checkpoint, parallel)
    found = ranks.run(_train_with_bad_batches, config, {5: "always"}, (3,), world_size=2, parallel=parallel)
    for watch, sentence, iteration, consumed in found:
        states = watch.after_step
        assert sentence == "" and (iteration, consumed) == (4, 16)
        assert states[0] != states[1] == states[2] == states[3] != states[4]
    lines = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["reason"]) for line in lines] == [
        (2, "the loss became nan"),
        (3, "the gradient norm became nan"),
    ]
    assert sorted({sample for share in lines[0]["read"] for sample in share["samples"]}) == [4, 5, 6, 7]
    assert "the data or the weights" in lines[0]["computed_again"]
