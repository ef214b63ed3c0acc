"""An align stage starts recurrent layers, gdn and mamba, in closed form, alike on every topology."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import OptimizerConfig, RunConfig
from spikingbrain_train.config.stage import DecayStart
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import checkpoint_config, run_config, train
from tests.small_source import save_small_source

SPLITS = {
    "one rank": (1, ParallelConfig()),
    "TP 2 + sequence parallel": (
        2,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "CP 2": (2, ParallelConfig(context_parallel_size=2)),
}


PARAMETERS = {
    "gdn": ("dt_bias", "linear_proj.weight"),
    "mamba": ("dt_proj.bias", "out_proj.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", PARAMETERS)
def test_half_lives_and_projections_are_fitted_to_the_source(
    mixer: str, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """Weights of all topologies to 1e-3 of the largest: a fit solves a system that enlarges rounding."""
    source, one = save_small_source(tmp_path / "source"), ParallelConfig()
    import_checkpoint(source, tmp_path / "dense")
    import_checkpoint(source, tmp_path / "hybrid", ConversionConfig(mixers=[mixer]))

    def config(name: str, steps: int, tokens: int, parallel: ParallelConfig) -> RunConfig:
        run = run_config(
            tmp_path / name,
            text,
            model=read_stored_model(tmp_path / "hybrid" / "iter_0000000"),
            checkpoint=checkpoint_config(tmp_path / "hybrid"),
        )
        run.stage.kind, run.stage.teacher = "align", str(tmp_path / "dense")
        run.stage.train_iters, run.stage.alignment.calibration_tokens = steps, tokens
        run.stage.alignment.decay_start = DecayStart.attention_distance
        run.parallel, run.optimizer = parallel, OptimizerConfig(lr=1e-30, weight_decay=0.0)
        return run

    losses = {}
    for tokens in (0, 2 * 4 * 32):
        (steps,) = ranks.run(train, config(f"{tokens}", 1, tokens, one), world_size=1, parallel=one)
        losses[tokens] = steps[0][0]
    assert losses[2 * 4 * 32] < 0.9 * losses[0]

    name = "decoder.layers.0.self_attention."
    converted = MegatronCheckpointReader(tmp_path / "hybrid" / "iter_0000000").read(
        name + PARAMETERS[mixer][0]
    )
    fitted = {}
    for topology, (size, parallel) in SPLITS.items():
        run = config(topology.replace(" ", "_"), 0, 2 * 4 * 32, parallel)
        ranks.run(train, run, world_size=size, parallel=parallel)
        reader = MegatronCheckpointReader(Path(run.output_dir) / "checkpoints" / "iter_0000000")
        fitted[topology] = [reader.read(name + each) for each in PARAMETERS[mixer]]
    half_lives = torch.log(torch.tensor(2.0)) / torch.nn.functional.softplus(fitted["one rank"][0])
    # Channels of a scan spread around that of their head.
    groups = read_stored_model(tmp_path / "hybrid" / "iter_0000000").num_query_groups
    half_lives = half_lives.view(groups, -1).log().mean(-1).exp()
    assert not torch.allclose(fitted["one rank"][0], converted, atol=0.1)
    assert (half_lives > 0.1).all() and (half_lives < 64).all(), "as far as texts of 32 tokens reach"
    for weights in fitted.values():
        for found, expected in zip(weights, fitted["one rank"], strict=True):
            assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
