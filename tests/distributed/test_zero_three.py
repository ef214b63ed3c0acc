"""ZeRO 3 gathers the weights that a module needs in every kind of model, and no rank keeps the others."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from spikingbrain_train.architecture.sizes import FP32
from spikingbrain_train.config.linear_transforms import Projection, TernaryConfig
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import GatedDeltaRuleConfig, ModelConfig
from spikingbrain_train.config.parallel import EngineKind, ParallelConfig, Recompute, ZeroConfig
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, run_config, train_and_not_save
from tests.planning.live_bytes import LiveBytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
    ),
]

TOLERANCE = 1e-5
"""Of a loss, as in test_deepspeed_engine.py: another order of fp32 sums of gradients."""
ZERO_3 = ParallelConfig(engine=EngineKind.deepspeed, zero=ZeroConfig(3))

MODELS: dict[str, tuple[ModelConfig, ParallelConfig]] = {
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
        ZERO_3,
    ),
    "ternary weights": (
        replace(MODEL, ternary=TernaryConfig([each for each in Projection if each is not Projection.gate])),
        ZERO_3,
    ),
    "adapters of a frozen model": (replace(MODEL, lora=LoraConfig(names=["code"], ranks=[2])), ZERO_3),
    "layers computed again": (MODEL, replace(ZERO_3, recompute=Recompute.full)),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_one_rank(name: str, ranks: RankPool, tmp_path: Path, text: Path) -> None:
    model, parallel = MODELS[name]
    config = run_config(tmp_path / "one", text, model=model)
    config.stage = replace(config.stage, train_iters=4)
    (expected,) = ranks.run(train_and_not_save, config, world_size=1, parallel=config.parallel)
    config = replace(config, parallel=parallel, output_dir=str(tmp_path / "two"))
    found, _ = ranks.run(train_and_not_save, config, world_size=2, parallel=parallel)
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
    from spikingbrain_train.training.engines import deepspeed
    from spikingbrain_train.training.trainer import Trainer

    memory = LiveBytes()
    probe = _Probe(memory)
    with pytest.MonkeyPatch.context() as patch, memory:
        patch.setattr(deepspeed, "REDUCE_BUCKET", bucket)
        trainer = Trainer(config, groups, [probe])
        model = trainer.state.model

        def count(*_: object) -> None:
            whole = sum(parameter.data.numel() for parameter in model.parameters())
            probe.held.gathered = max(probe.held.gathered, whole)

        for name, module in model.named_modules():
            if name.endswith(("linear_qkv", "linear_fc1", "linear_fc2")):
                module.register_forward_hook(count)
                next(module.parameters()).register_hook(count)
        trainer.train()
        probe.held.norm = trainer.engine.parameter_norm(groups).item()
    return probe.held


def test_every_rank_keeps_its_share_as_planned(
    ranks: RankPool, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four ranks, in a wide model of short sequences, with buckets of a layer."""
    model = replace(MODEL, num_layers=8, hidden_size=128, ffn_hidden_size=384, kv_channels=32)
    bucket = 200_000
    monkeypatch.setattr("spikingbrain_train.planning.memory.REDUCE_BUCKET", bucket)
    found, plans = {}, {}
    for stage in (2, 3):
        parallel = replace(ZERO_3, zero=ZeroConfig(stage))
        config = run_config(tmp_path / str(stage), text, model=model, parallel=parallel)
        config.stage = replace(config.stage, train_iters=3)
        assert config.precision is Precision.fp32
        found[stage] = ranks.run(_measure, config, bucket, world_size=4, parallel=parallel)
        plans[stage] = plan_run(config, 4).fullest.memory
    plan, parameters = plans[3], plans[2].weights / FP32
    output, largest = (
        model.padded_vocab_size(1) * model.hidden_size,
        2 * model.ffn_hidden_size * model.hidden_size,
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
