"""ZeRO 3 and FSDP gather what modules need in every kind of model, and no rank keeps the other weights."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.architecture.layers import dense_source, layers
from spikingbrain_train.architecture.sizes import FP32
from spikingbrain_train.config.linear_transforms import Projection, TernaryConfig
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import GatedDeltaRuleConfig, ModelConfig
from spikingbrain_train.config.parallel import EngineKind, FsdpConfig, ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.costs import layer_parameters, parameters_around, stage_parameters
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import FSDP, case, fsdp, zero
from tests.distributed.small_runs import MODEL, run_config, train, train_and_not_save, values_of
from tests.planning.live_bytes import LiveBytes

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Of a loss, as in test_sharding_engines.py: another order of fp32 sums of gradients."""
ENGINES = {"ZeRO 3": zero(3), "FSDP": FSDP}

MODELS: dict[str, tuple[ModelConfig, Recompute]] = {
    "branches of gated delta rule and Mamba, sinks, sub-norms, an output projection of its own": (
        replace(
            MODEL,
            mixers=[["gdn", "swa"], ["mamba", "full"]],
            gdn=GatedDeltaRuleConfig(num_query_groups=4, short_convolution=4, output_gate=True),
            mamba=MambaConfig(state_size=5, time_step_rank=3, mixer_rms_eps=1e-2),
            num_sink_tokens=4,
            attn_sub_norm=True,
            ffn_sub_norm=True,
            share_embeddings_and_output_weights=False,
        ),
        Recompute.none,
    ),
    "ternary weights": (
        replace(MODEL, ternary=TernaryConfig([each for each in Projection if each is not Projection.gate])),
        Recompute.none,
    ),
    "adapters of a frozen model": (
        replace(MODEL, lora=LoraConfig(names=["code"], ranks=[2])),
        Recompute.none,
    ),
    "adapters of a frozen model whose layers are computed again": (
        replace(MODEL, lora=LoraConfig(names=["code"], ranks=[2])),
        Recompute.full,
    ),
    "layers computed again": (MODEL, Recompute.full),
    "feed-forwards computed again": (MODEL, Recompute.moe_layer),
}


@pytest.mark.parametrize("engine", [case(name, engine=each.engine) for name, each in ENGINES.items()])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_one_rank(
    name: str, engine: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    model, recompute = MODELS[name]
    parallel = replace(ENGINES[engine], recompute=recompute)
    config = run_config(tmp_path / "one", text, model=model)
    config.stage = replace(config.stage, train_iters=4)
    config.optimizer = replace(config.optimizer, mixer_lr_mult=2.0)  # beside a rate of new parameters
    (expected,) = ranks.run(train_and_not_save, config, world_size=1, parallel=config.parallel)
    config = replace(config, parallel=parallel, output_dir=str(tmp_path / "two"))
    found, _ = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)
    norms = [values_of("train/parameter_norm", tmp_path / folder) for folder in ("one", "two")]
    assert len(norms[0]) == 4 and norms[1] == pytest.approx(norms[0], rel=TOLERANCE)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-3)


@dataclass
class Held:
    """Of one rank: bytes of all tensors, and weights that lie there whole."""

    static: int = 0
    """Between two steps."""
    peak: int = 0
    """Within the last."""
    gathered: int = 0
    """Most elements of weights at a time, whenever a projection computed."""
    norm: float = 0.0
    """Of all weights at the end, as reports have it."""


class _Probe(Callback):
    def __init__(self, memory: LiveBytes) -> None:
        self._memory = memory
        self.held = Held()

    def step_begin(self) -> None:
        gc.collect()
        self._memory.reset_peak()
        self.held = Held(static=self._memory.live)

    def step_end(self) -> None:
        self.held.peak = self._memory.peak


def _measure(groups: ProcessGroups, config: RunConfig, bucket: int) -> Held:
    from spikingbrain_train.parallel.own_part import own_part
    from spikingbrain_train.training.trainer import Trainer

    memory = LiveBytes()
    probe = _Probe(memory)
    with pytest.MonkeyPatch.context() as patch, memory:
        if config.parallel.engine is EngineKind.deepspeed:
            patch.setattr("spikingbrain_train.training.engines.deepspeed.REDUCE_BUCKET", bucket)
        trainer = Trainer(config, groups, [probe])
        model = trainer.state.model

        def count(*_: object) -> None:
            whole = sum(own_part(parameter).numel() for parameter in model.parameters())
            probe.held.gathered = max(probe.held.gathered, whole)

        def count_both_ways(_: object, __: object, output: Any) -> None:
            count()
            if output[0].requires_grad:
                output[0].register_hook(count)

        for name, module in model.named_modules():
            if name.endswith(("linear_qkv", "linear_fc1", "linear_fc2")):
                module.register_forward_hook(count_both_ways)
        trainer.train()
        probe.held.norm = trainer.engine.parameter_norm(groups).item()
    return probe.held


WIDE = replace(MODEL, num_layers=8, hidden_size=128, ffn_hidden_size=384, kv_channels=32)
"""Wide, for short sequences: most of the memory is that of weights."""


@pytest.mark.parametrize("engine", [case("ZeRO 3", engine=EngineKind.deepspeed)])
def test_every_rank_keeps_its_share_as_planned(
    engine: str, ranks: RankPool, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four ranks, with buckets of a layer."""
    bucket = 200_000
    monkeypatch.setattr("spikingbrain_train.planning.memory.REDUCE_BUCKET", bucket)
    found, plans = {}, {}
    for stage in (2, 3):
        parallel = zero(stage)
        config = run_config(tmp_path / str(stage), text, model=WIDE, parallel=parallel)
        config.stage = replace(config.stage, train_iters=3)
        assert config.precision is Precision.fp32
        found[stage] = ranks.run(_measure, config, bucket, world_size=4, parallel=parallel)
        plans[stage] = plan_run(config, 4).fullest.memory
    plan, parameters = plans[3], plans[2].weights / FP32
    output, largest = (
        WIDE.padded_vocab_size(1) * WIDE.hidden_size,
        2 * WIDE.ffn_hidden_size * WIDE.hidden_size,
    )
    for of_two, held in zip(found[2], found[3], strict=True):
        assert of_two.gathered == parameters
        assert held.norm == pytest.approx(of_two.norm, rel=TOLERANCE)
        # A module is gathered, however large, once what was gathered before has reached the bound.
        assert held.gathered <= bucket + output + largest < parameters / 4
        # Between two steps only the output projection is whole, and there is one bucket.
        static = plan.total - plan.activations - 2 * bucket * FP32
        assert held.static == pytest.approx(static, rel=0.025)
        assert plan.total == pytest.approx(held.peak, rel=0.1)
        assert held.static < 0.85 * of_two.static and held.peak < 0.95 * of_two.peak


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        case(parallel, precision, engine=EngineKind.fsdp, name=f"{name}, {precision.name}")
        for name, parallel, precision in (
            ("DP 4", FSDP, Precision.fp32),
            ("DP 4", FSDP, Precision.bf16),
            ("TP 2 x DP 2", fsdp(tensor_model_parallel_size=2), Precision.bf16),
            ("DP 4, weights kept", fsdp(fsdp=FsdpConfig(reshard_after_forward=False)), Precision.bf16),
        )
    ],
)
def test_every_rank_of_fsdp_keeps_its_share_as_planned(
    parallel: ParallelConfig,
    precision: Precision,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
) -> None:
    """State is a share of 16 bytes a parameter in either precision, and nothing whole lies beside it."""
    config = run_config(tmp_path, text, model=WIDE, parallel=parallel, precision=precision)
    config.stage = replace(config.stage, train_iters=3)
    found = ranks.run(_measure, config, 0, world_size=4, parallel=parallel)
    plan = plan_run(config, 4).fullest.memory
    parameters = stage_parameters(WIDE, parallel, 0)
    share = parameters * parallel.tensor_model_parallel_size / 4
    gathered = parameters_around(WIDE, parallel, 0)
    gathered += 2 * max(layer_parameters(WIDE, layer, parallel) for layer in layers(WIDE))
    for held in found:
        assert held.static == pytest.approx(4 * FP32 * share, rel=0.01)
        assert plan.total == pytest.approx(held.peak, rel=0.1)
        if parallel.fsdp.reshard_after_forward:
            assert held.gathered <= share + gathered < 0.8 * parameters
        else:
            assert held.gathered == parameters


def test_an_align_stage_under_fsdp_keeps_a_share_of_the_mixers_that_train(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Whatever is frozen is whole on every rank, in bf16, and the teacher beside it."""
    teacher = run_config(tmp_path / "teacher", text, model=dense_source(WIDE), precision=Precision.bf16)
    teacher.stage = replace(teacher.stage, train_iters=1)
    teacher.optimizer.lr_warmup_iters = 0
    ranks.run(train, teacher, world_size=1, parallel=teacher.parallel)
    config = run_config(tmp_path / "align", text, model=WIDE, parallel=FSDP, precision=Precision.bf16)
    config.stage = replace(
        config.stage, kind="align", train_iters=3, teacher=str(tmp_path / "teacher" / "checkpoints")
    )
    config.stage.alignment = replace(config.stage.alignment, calibration_tokens=0)
    found = ranks.run(_measure, config, 0, world_size=4, parallel=FSDP)
    plan = plan_run(config, 4).fullest.memory
    trained = sum(kind_of(config.stage).trainable_parameters(config, 0))
    frozen = stage_parameters(WIDE, FSDP, 0) - trained
    for held in found:
        assert held.static == pytest.approx(2 * frozen + 4 * FP32 * trained / 4 + plan.teacher, rel=0.01)
        assert plan.total == pytest.approx(held.peak, rel=0.1)
