"""A setting that somebody has set and nothing reads gets a line; what is read, or default, gets none."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.compose import compose_run, groups
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.planning.plan_report.report import as_values, render
from spikingbrain_train.planning.unread_settings import unread_settings
from tests.config.small_model import small_model, write_checkpoint
from tests.planning.runs import plan_of

DENSE = "model=tiny_hybrid model.mixers=[full] model.sliding_window=4096"
WITHOUT = "model=tiny_hybrid model.mixers=[full]"


def notes(*overrides: str) -> list[str]:
    arguments = [argument for override in overrides for argument in override.split()]
    config = to_run_config(compose_run([*arguments, "dry_run=true"]))
    return [each.describe() for each in unread_settings(config)]


@pytest.mark.parametrize(
    ("set_", "name", "reason"),
    [
        (WITHOUT, "model.sliding_window=32", "the model has no sliding-window layers"),
        (f"{DENSE} model.gla.gate_low_rank_dim=8", "model.gla.gate_low_rank_dim=8", "gated linear attention"),
        (f"{DENSE} model.moe.num_experts=4", "model.moe.num_experts=4", "no mixture-of-experts layers"),
        (f"{DENSE} model.spiking.k=5", "model.spiking.k=5", "applied nowhere"),
        (f"{DENSE} model.parallel_hybrid.init_linear_weight=1", "init_linear_weight=1", "several branches"),
        (
            "model=tiny_76b model.gla.gate_low_rank_dim=8",
            "model.gla.gate_low_rank_dim=8",
            "another choice in model.gla",
        ),
        (
            f"{DENSE} stage.distillation.temperature=2",
            "temperature=2",
            "stage.kind=cpt does not read it; distill would",
        ),
        (f"{DENSE} stage.alignment.calibration_tokens=0", "calibration_tokens=0", "align would"),
        (
            "model=tiny_hybrid stage=align stage.alignment.source_projection_ridge=2 stage.teacher=dense",
            "source_projection_ridge=2",
            "another choice in stage.alignment",
        ),
        (f"{DENSE} stage.teacher=dense", "stage.teacher=dense", "learns from no teacher"),
        (f"{DENSE} optimizer.lr_wsd_decay_style=cosine", "lr_wsd_decay_style=cosine", "the style is cosine"),
        (f"{DENSE} optimizer.muon_momentum=0.9", "muon_momentum=0.9", "choose optimizer=muon_cosine"),
        (f"{DENSE} numerics.spike_window=99", "spike_window=99", "set numerics.spike_factor or"),
        (f"{DENSE} numerics.on_bad_batch=stop numerics.replay=false", "replay=false", "ends the run at once"),
        (f"{DENSE} logging.eval_interval=5 data.train=[a]", "logging.eval_interval=5", "data.valid"),
        (f"{DENSE} logging.wandb_name=mine", "logging.wandb_name=mine", "logging.wandb is disabled"),
        (
            f"{DENSE} parallel.context_parallel.gated_linear_attention=ulysses",
            "gated_linear_attention=ulysses",
            "context_parallel_size is 1",
        ),
        (f"{DENSE} optimizer.mixer_lr_mult=10", "mixer_lr_mult=10", "the mixer of a dense source"),
        (f"{DENSE} model.fatrelu_threshold=0.1", "fatrelu_threshold=0.1", "model.activation_func is silu"),
        (
            "model=tiny_76b parallel.recompute=full parallel.recompute_expert_tokens=9",
            "recompute_expert_tokens=9",
            "computes every expert again",
        ),
        (f"{DENSE} cluster.kernels.experts=sequential", "kernels.experts=sequential", "no experts"),
    ],
)
def test_what_nothing_reads_is_said_in_a_line(set_, name, reason):
    (note,) = notes(set_)
    assert name in note and reason in note and "\n" not in note


@pytest.mark.parametrize(
    "set_",
    [
        *(f"model={choice}" for choice in groups()["model"] if choice != "from_checkpoint"),
        *(
            f"experiment={choice} checkpoint.load=null"
            for choice in groups()["experiment"]
            if "_7b" in choice
        ),
        *(
            f"experiment={choice} checkpoint.load=null"
            for choice in groups()["experiment"]
            if "76b" in choice
        ),
        *(f"model=tiny_hybrid cluster={choice}" for choice in groups()["cluster"]),
        "experiment=smollm2_align model=smollm2_135m_hybrid",
        "experiment=smollm2_cpt model=smollm2_135m_hybrid",
        "model=tiny_hybrid optimizer=adamw_wsd",
        "model=tiny_hybrid stage=align",
        "model=tiny_hybrid model.sliding_window=7 logging.eval_interval=5 data.train=[a] data.valid=[b]",
    ],
)
def test_presets_and_what_is_read_are_no_noise(set_):
    assert notes(set_) == []


def test_what_a_checkpoint_brings_along_is_nobodys_choice(tmp_path):
    stored = small_model(mixers=["full"], sliding_window=32)
    load = f"checkpoint.load={write_checkpoint(tmp_path / 'dense', stored, iteration=0)}"
    assert notes(load) == []
    (note,) = notes(f"{load} model.sliding_window=7")
    assert "model.sliding_window=7" in note


def test_the_plan_shows_them():
    plan = plan_of(WITHOUT)
    assert "note" in render(plan) and "model.sliding_window=32 has no effect" in render(plan)
    assert as_values(plan)["notes"] == [
        "model.sliding_window=32 has no effect: the model has no sliding-window layers"
    ]
    assert "notes" not in as_values(plan_of(DENSE))
