"""Hours of a run at a stated, measured or reported speed, and against what SpikingBrain's report measured."""

from __future__ import annotations

import json

import pytest

from spikingbrain_train.architecture.layers import dense_source, layers, swapped_layers
from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.planning.costs import forward_flops_per_token
from spikingbrain_train.planning.duration import TFLOPS_METRIC, duration_of, speed_of
from spikingbrain_train.planning.plan_report.report import render
from spikingbrain_train.reporting.metrics import METRICS_FILE
from tests.planning.runs import plan_of

EXPERIMENT = "experiment=spikingbrain_7b_8k"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def measured(folder, *tflops):
    folder.mkdir()
    lines = [{"iteration": 0, "time": 1.0, "event": "started", "run": {}}]
    lines += [{"iteration": step, TFLOPS_METRIC: value} for step, value in enumerate(tflops, start=1)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_hours_are_flops_over_what_all_ranks_get_done():
    plan = plan_of(EXPERIMENT, "cluster.accelerator=cuda cluster.peak_tflops=100 cluster.mfu=0.5")
    duration = duration_of(plan)
    flops = plan.flops_per_token * 100e9
    assert duration.gpu_hours == pytest.approx(flops / 50e12 / 3600, rel=1e-3)
    assert duration.hours == pytest.approx(duration.gpu_hours / 32)
    assert duration.seconds_per_step == pytest.approx(duration.hours * 3600 / 23842)
    assert duration.tokens_per_second_per_rank == pytest.approx(50e12 / plan.flops_per_token)
    assert (duration.speed.kind, duration.speed.mfu) == ("stated", 0.5)


def test_an_assumed_time_of_a_run_in_fp8_says_that_it_is_one_of_bf16():
    stated = "cluster.mfu=0.3"
    for settings, said in (("", False), ("fp8.format=hybrid", True), (f"fp8.format=hybrid {stated}", False)):
        text = render(plan_of(EXPERIMENT, f"cluster=h100 {settings}"))
        assert ("what fp8.format saves is not in it" in " ".join(text.split())) is said


def test_the_reported_run_takes_as_long_as_reported():
    # Section 5.4 of arXiv 2509.05276: 1,558 tokens a second and GPU at an MFU of 23.4 %. The preset's peak is
    # derived from that: this holds it and the planner's FLOPs together, and proves no more.
    duration = duration_of(plan_of(EXPERIMENT, "cluster=c550"))
    assert duration.tokens_per_second_per_rank == pytest.approx(1558, rel=1e-3)
    assert duration.speed.kind == "assumed" and duration.speed.mfu == pytest.approx(0.234)


def test_an_idler_pipeline_lowers_the_reported_utilisation():
    # 4 micro-batches over 4 stages idle for 3/7 of a step, where the reported run idled for 3/35.
    plan = plan_of("experiment=spikingbrain_76b_128k", "cluster=c550")
    assert speed_of(plan).mfu == pytest.approx(0.234 * (4 / 7) / (32 / 35))
    assert "8.6%" in speed_of(plan).source and "42.9%" in speed_of(plan).source


def test_a_measured_run_gives_its_median_without_the_first_interval(tmp_path):
    folder = measured(tmp_path / "earlier", 1.0, 60.0, 64.0, 70.0)
    plan = plan_of(EXPERIMENT, f"cluster=c550 cluster.measured_in={folder}")
    speed = speed_of(plan)
    assert (speed.kind, speed.tflops) == ("measured", 64.0) and str(folder) in speed.source
    assert speed.mfu == pytest.approx(64 / 295)


def test_an_output_folder_that_has_measured_needs_no_setting_and_no_peak(tmp_path):
    folder = measured(tmp_path / "run", 0.25)
    plan = plan_of("model=tiny_hybrid cluster=cpu stage.seq_length=256", f"output_dir={folder}")
    duration = duration_of(plan)
    assert (duration.speed.kind, duration.speed.mfu) == ("measured", None)
    assert duration.seconds_per_step == pytest.approx(plan.tokens_per_step * plan.flops_per_token / 0.25e12)


@pytest.mark.parametrize("settings", ["cluster=nvidia", "cluster=metax cluster.mfu=0.3", "cluster=cpu"])
def test_without_a_peak_or_a_measurement_there_are_no_hours(settings):
    assert duration_of(plan_of(EXPERIMENT, settings)) is None


def test_an_own_folder_without_a_measurement_does_not_matter(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1, "train/loss": 2.0}\n')
    assert duration_of(plan_of(EXPERIMENT, f"cluster=cpu output_dir={tmp_path}")) is None
    (tmp_path / METRICS_FILE).write_text("damaged\n")
    assert duration_of(plan_of(EXPERIMENT, f"cluster=cpu output_dir={tmp_path}")) is None


def test_a_named_folder_has_to_have_one(tmp_path):
    with pytest.raises(DataError, match="cluster.measured_in=.* cannot be used: .* does not exist"):
        speed_of(plan_of(EXPERIMENT, f"cluster=c550 cluster.measured_in={tmp_path}"))
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1, "train/loss": 2.0}\n')
    with pytest.raises(DataError, match="cluster.measured_in=.* has no train/tflops"):
        speed_of(plan_of(EXPERIMENT, f"cluster=c550 cluster.measured_in={tmp_path}"))


def test_one_speed_is_enough():
    with pytest.raises(ConfigurationError, match="cluster.mfu=0.3 and cluster.measured_in=run both say"):
        plan_of(EXPERIMENT, "cluster=c550 cluster.mfu=0.3 cluster.measured_in=run")


def test_the_published_gain_at_128k_is_within_what_flops_explain():
    # Section 5.4: training at 128k is 5.36 times as fast as with full attention in all layers. By FLOPs alone
    # it is 2.7 times; the report's runs differ in MFU, too, which a plan knows nothing of.
    plan = plan_of("experiment=spikingbrain_7b_128k")
    dense = 3 * forward_flops_per_token(dense_source(plan.config.model), 131072)
    assert 2.5 < dense / plan.flops_per_token < 5.36


def test_the_closed_form_start_takes_time_too_stage_after_stage():
    words = "cluster.accelerator=cuda cluster.peak_tflops=100 cluster.mfu=0.5 stage.teacher=x"
    words += " stage.alignment.calibration_tokens=200000 stage.alignment.fit_source_projections=false"
    words += " optimizer.lr_warmup_iters=0"
    align = "experiment=spikingbrain_7b_align"
    alone = plan_of(align, f"{words} stage.train_iters=0")
    whole = plan_of(align, f"{words} stage.train_iters=100")
    tokens = alone.config.stage.tokens
    assert 200_000 <= tokens < 200_000 + alone.tokens_per_step and alone.start_flops == whole.start_flops
    model, length = alone.config.model, alone.config.stage.seq_length
    passes = [
        forward_flops_per_token(each, length, output_layer=False) for each in (model, dense_source(model))
    ]
    swapped = len(swapped_layers(layers(model)))
    fits = 2 * swapped * model.hidden_size * 2 * model.hidden_size  # heads are as wide as hidden states
    assert alone.start_flops == alone.total_flops == pytest.approx(tokens * (sum(passes) + fits))
    start = duration_of(alone).hours * 3600
    seconds = duration_of(whole).hours * 3600
    assert start == pytest.approx(alone.start_flops * len(alone.stages) / (50e12 * alone.world_size))
    assert seconds == pytest.approx(start + 100 * duration_of(whole).seconds_per_step)
