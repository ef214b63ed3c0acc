"""What an align stage measures of its dense source before the first step, and how it starts from that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig
from spikingbrain_train.config.run import OptimizerConfig, RunConfig
from spikingbrain_train.config.run_record import StageTokens
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.resume import nothing_left, run_to_resume
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.reporting.metrics import read_metrics
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp
from tests.distributed.small_runs import MODEL, checkpoint_config, run_config, train
from tests.distributed.test_calibration import gla_mixer
from tests.small_source import save_small_source

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 24, 4, 2, 8
BOUNDS = ((0, 9, 24), (0, 24))
SPLITS = [
    pytest.param(1, ParallelConfig(), id="one rank"),
    pytest.param(2, ParallelConfig(tensor_model_parallel_size=2), id="TP 2"),
    pytest.param(2, ParallelConfig(context_parallel_size=2), id="CP 2"),
]


def _layout(groups: ProcessGroups) -> SequenceLayout:
    return SequenceLayout(
        LENGTH,
        context_parallel_rank=groups.context_parallel_rank,
        context_parallel_size=groups.context_parallel_size,
        cu_seqlens=BOUNDS,
    )


def _attention_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = 3 * torch.randn(ROWS, LENGTH, HEADS, WIDTH, generator=generator)
    return q, torch.randn(ROWS, LENGTH, GROUPS, WIDTH, generator=generator)


def _distances(groups: ProcessGroups, window: int | None) -> torch.Tensor:
    from spikingbrain_train.parallel.context_parallel import attention_distances

    attention_distances._CHUNK_ELEMENTS = 5 * ROWS * HEADS * LENGTH  # several chunks, the last one shorter
    layout = _layout(groups)
    q, k = (x[:, layout.text_range().start : layout.text_range().stop] for x in _attention_inputs())
    if groups.tensor_model_parallel_size > 1:
        q, k = (x.chunk(2, dim=2)[groups.tensor_model_parallel_rank] for x in (q, k))
    return attention_distances.attention_distances(
        q, k, window=window, layout=layout, cp_group=groups.collection.cp, scale=WIDTH**-0.5
    )


def _expected_distances(window: int | None) -> torch.Tensor:
    q, k = (x.double() for x in _attention_inputs())
    sums = torch.zeros(HEADS, dtype=torch.float64)
    for row, bounds in enumerate(BOUNDS):
        for start, end in zip(bounds, bounds[1:], strict=False):
            for head in range(HEADS):
                for t in range(start + 1, end):
                    first = start if window is None else max(start, t - window + 1)
                    scores = k[row, first : t + 1, head // (HEADS // GROUPS)] @ q[row, t, head] * WIDTH**-0.5
                    weights = scores.softmax(0)
                    if first == start:
                        weights[0] = 0
                    distance = torch.arange(t - first, -1, -1).double()
                    sums[head] += (weights * distance).sum() / weights.sum()
    return sums


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("world_size", "parallel"), SPLITS)
def test_distances_leave_out_other_documents_and_their_first_tokens(
    world_size: int, parallel: ParallelConfig, window: int | None, ranks: RankPool
) -> None:
    found = ranks.run(_distances, window, world_size=world_size, parallel=parallel)

    over_heads = parallel.tensor_model_parallel_size > 1
    together = torch.cat(found) if over_heads else torch.stack(found).sum(0)
    assert torch.allclose(together, _expected_distances(window), rtol=1e-5)


def _half_lives_of_gates(groups: ProcessGroups) -> torch.Tensor:
    mixer = gla_mixer(groups, ParallelConfig(), qk_layernorm=False)
    torch.nn.init.zeros_(mixer.linear_gate_up_proj.weight)
    mixer.set_half_lives(torch.tensor([4.0, 16.0, 400.0, 100.0], dtype=torch.float64))
    log_gate = mixer.log_gate(torch.zeros(1, 1, MODEL.hidden_size), torch.zeros(1, 1, GROUPS, WIDTH))
    return -torch.log(torch.tensor(2.0)) / log_gate.detach()[0, 0]


def test_channels_remember_from_shorter_to_longer_than_their_heads(ranks: RankPool) -> None:
    (half_lives,) = ranks.run(_half_lives_of_gates, world_size=1, parallel=ParallelConfig())

    spread = torch.logspace(-1, 1, WIDTH, base=16)
    assert torch.allclose(half_lives, torch.tensor([[8.0], [200.0]]) * spread, rtol=1e-3)


def _channel_scales(groups: ProcessGroups, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    from spikingbrain_train.training.stages.channel_scales import ChannelScales

    mixer = gla_mixer(groups, parallel, qk_layernorm=False)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(LENGTH, ROWS, MODEL.hidden_size, generator=generator)
    target = torch.randn(ROWS, LENGTH, HEADS, WIDTH, generator=generator)
    layout, text = _layout(groups), _layout(groups).text_range()
    here = hidden[text.start : text.stop]
    scales = ChannelScales(groups)
    taken = [at for at in text if at % 3 == 2]
    channels = mixer.channel_outputs(here, layout, 3)
    heads = target[:, taken]
    if groups.tensor_model_parallel_size > 1:
        heads = heads.chunk(2, dim=2)[groups.tensor_model_parallel_rank]
    scales.add(channels, heads.reshape(-1, *heads.shape[2:]))
    found = scales.solve()
    mixer.scale_channels(found)
    return {"scales": found, "before": channels, "after": mixer.channel_outputs(here, layout, 3)}


@pytest.fixture(scope="module")
def scales_of_one_rank(ranks: RankPool) -> torch.Tensor:
    (result,) = ranks.run(_channel_scales, ParallelConfig(), world_size=1, parallel=ParallelConfig())
    return result["scales"]


@pytest.mark.parametrize(("world_size", "parallel"), SPLITS)
def test_channels_are_scaled_alike_on_every_topology(
    world_size: int, parallel: ParallelConfig, scales_of_one_rank: torch.Tensor, ranks: RankPool
) -> None:
    results = ranks.run(_channel_scales, parallel, world_size=world_size, parallel=parallel)

    for result in results:
        scaled = result["before"] * result["scales"].unsqueeze(-1).float()
        assert torch.allclose(result["after"], scaled, rtol=1e-4, atol=1e-7)
    scales = [result["scales"] for result in results]
    if parallel.tensor_model_parallel_size > 1:
        scales = [torch.cat(scales)]
    for each in scales:
        assert torch.allclose(each, scales_of_one_rank, rtol=1e-5)


def test_least_squares_without_negative_factors_end_where_no_factor_wants_to_move() -> None:
    from spikingbrain_train.training.stages.channel_scales import non_negative_least_squares

    features = torch.randn(3, 200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = features @ torch.linspace(-1, 1, 12, dtype=torch.float64) + 0.1
    gram, cross = (
        features.transpose(1, 2) @ features,
        (features.transpose(1, 2) @ target.unsqueeze(-1))[..., 0],
    )

    x = non_negative_least_squares(gram, cross)

    slope = (gram @ x.unsqueeze(-1))[..., 0] - cross
    assert (x >= 0).all() and (x == 0).any() and (x > 0).any()
    assert slope[x > 0].abs().max() < 1e-6 and slope.min() > -1e-6


def test_sinks_have_no_part_in_what_is_learnt_on_the_dense_sources_states(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """In float32: the sums are the same, and rows of zeros beside them."""
    source, one = save_small_source(tmp_path / "source"), ParallelConfig()
    import_checkpoint(source, tmp_path / "dense")
    losses = []
    for sinks in (0, 3):
        folder = tmp_path / str(sinks)
        recipe = ConversionConfig(mixers=["gla"], sliding_window=7, num_sink_tokens=sinks)
        import_checkpoint(source, folder / "hybrid", recipe)
        run = run_config(
            folder / "run",
            text,
            model=read_stored_model(folder / "hybrid" / "iter_0000000"),
            checkpoint=checkpoint_config(folder / "hybrid"),
        )
        run.stage.kind, run.stage.teacher = "align", str(tmp_path / "dense")
        run.stage.alignment.calibration_tokens = 0
        (steps,) = ranks.run(train, run, world_size=1, parallel=one)
        losses.append([loss for loss, _ in steps])

    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def _train_and_stop_at_once(groups: ProcessGroups, config: RunConfig) -> None:
    from spikingbrain_train.training.trainer import Trainer

    trainer = Trainer(config, groups)
    trainer.stop("asked to stop")
    trainer.train()


def test_a_run_that_goes_on_does_not_start_again(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, dense_checkpoint: Path
) -> None:
    def config(name: str) -> RunConfig:
        run = run_config(tmp_path / name, text, checkpoint=checkpoint_config(hybrid_checkpoint))
        run.stage.kind, run.stage.train_iters, run.stage.teacher = "align", 3, str(dense_checkpoint)
        return run

    one = ParallelConfig()
    ((expected, *_),) = ranks.run(train, config("whole"), world_size=1, parallel=one)
    ranks.run(_train_and_stop_at_once, config("stopped"), world_size=1, parallel=one)
    ((resumed, *_),) = ranks.run(train, config("stopped"), world_size=1, parallel=one)

    assert resumed == expected
    starts = [point for point in read_metrics(tmp_path / "stopped") if "align/start/error" in point]
    assert len(starts) == 1


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = MegatronCheckpointReader(checkpoint)
    return {name: reader.read(name) for name in reader.tensors if not name.startswith("optimizer.")}


def _held_out(run: Path) -> list[float]:
    return [point["valid/cross_entropy"] for point in read_metrics(run) if "valid/cross_entropy" in point]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        pytest.param(1, ParallelConfig(), id="one rank"),
        pytest.param(2, ParallelConfig(use_distributed_optimizer=True), id="DP 2, distributed optimizer"),
        case(2, fsdp(), engine=EngineKind.fsdp, name="DP 2, FSDP"),
    ],
)
def test_a_stage_without_steps_leaves_its_closed_form_start_alone(
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    hybrid_checkpoint: Path,
    dense_checkpoint: Path,
    world_size: int,
    parallel: ParallelConfig,
) -> None:
    """As two steps that move nothing leave it, on the same tokens; held-out text is measured behind it."""

    def config(steps: int, name: str = "") -> RunConfig:
        run = run_config(
            tmp_path / (name or str(steps)), text, checkpoint=checkpoint_config(hybrid_checkpoint)
        )
        run.stage.kind, run.stage.train_iters, run.stage.teacher = "align", steps, str(dense_checkpoint)
        run.stage.alignment.calibration_tokens, run.stage.micro_batch_size = 2 * 4 * 32, 2
        run.parallel, run.optimizer = parallel, OptimizerConfig(lr=1e-30, weight_decay=0.0)
        run.data.valid, run.logging.eval_interval = [str(text)], 10
        return run

    for steps in (0, 2):
        ranks.run(train, config(steps), world_size=world_size, parallel=parallel)
    alone, moved = (tmp_path / str(steps) / "checkpoints" / f"iter_{steps:07}" for steps in (0, 2))
    expected = _weights(moved)
    for name, value in _weights(alone).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-28), name
    before, after = _held_out(tmp_path / "0")
    assert after == _held_out(tmp_path / "2")[-1] != before
    assert any("align/start/error" in point for point in read_metrics(tmp_path / "0"))
    assert history_with(alone).stages[-1] == StageTokens("align", 2 * 4 * 32, str(alone))

    stored = run_to_resume(config(0))
    assert stored is not None and "nothing is left to do" in (nothing_left(config(0), stored) or "")
    more, *_ = ranks.run(train, config(3, "0"), world_size=world_size, parallel=parallel)
    fresh, *_ = ranks.run(train, config(3), world_size=world_size, parallel=parallel)
    assert len(more) == 3 and more == fresh
