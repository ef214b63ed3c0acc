"""A rank fits its device, is tight or does not fit; what would help is planned anew; a run says it too."""

from __future__ import annotations

import dataclasses

import pytest

from spikingbrain_train.config.compose import groups
from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.planning import fit
from spikingbrain_train.planning.fit import MARGIN, DeviceMemory, Fit, device_memory
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.memory_warning import memory_warning
from spikingbrain_train.planning.planner import plan_run
from spikingbrain_train.planning.remedies import remedies, together
from tests.planning.runs import plan_of

SINGLE = "experiment=spikingbrain_7b_8k parallel=single cluster=c550"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("needed", "verdict"),
    [(0, Fit.fits), (90, Fit.fits), (91, Fit.tight), (100, Fit.tight), (101, Fit.too_large)],
)
def test_a_tenth_of_the_device_stays_free(needed, verdict):
    assert MARGIN == 0.1
    assert DeviceMemory(100, "").fit(needed) is verdict


def test_memory_is_stated_or_this_machines_or_unknown(monkeypatch):
    monkeypatch.setattr(fit, "memory_limit", lambda: 16 * GIB)
    stated = plan_of("model=tiny_hybrid cluster=cpu cluster.memory_gib=3").config.cluster
    assert device_memory(stated, 4).bytes == 3 * GIB
    cpu = dataclasses.replace(stated, memory_gib=None)
    assert device_memory(cpu, 4).bytes == 4 * GIB and "shared by 4 ranks" in device_memory(cpu, 4).source
    for gpu in ("cuda", "metax"):
        assert device_memory(dataclasses.replace(cpu, accelerator=AcceleratorKind(gpu)), 1) is None


def test_presets_of_gpus_state_memory_and_peak():
    presets = set(groups()["cluster"]) - {"auto", "cpu", "nvidia", "metax"}
    assert presets == {"a800", "h100", "h200", "c550"}
    platforms = {}
    for preset in presets:
        cluster = plan_of(f"model=tiny_hybrid cluster={preset}").config.cluster
        assert 60 < cluster.memory_gib < 150 and 290 < cluster.peak_tflops < 1000
        assert cluster.mfu is None  # measured, or said to be assumed
        platforms[preset] = cluster.accelerator.value
    assert platforms == {"a800": "cuda", "h100": "cuda", "h200": "cuda", "c550": "metax"}


def test_remedies_are_what_the_planner_says_of_them():
    plan = plan_of(SINGLE)
    device = device_memory(plan.config.cluster, 1)
    found = remedies(plan, device)
    totals = [remedy.needed for remedy in found]
    assert totals == sorted(totals) and totals[-1] < plan.fullest.memory.total
    names = {name for remedy in found for name in remedy.settings}
    assert {"parallel.recompute", "stage.micro_batch_size", "parallel.tensor_model_parallel_size"} <= names
    for remedy in found:  # as if the user had typed them
        replicas = f"parallel.data_parallel_size={remedy.plan.data_parallel_size}"
        typed = plan_of(SINGLE, *remedy.arguments(), replicas)
        assert typed.fullest.memory.total == remedy.needed
        assert typed.world_size == remedy.plan.world_size


def test_the_mildest_value_that_fits_is_named():
    plan = plan_of("experiment=spikingbrain_76b_8k cluster=c550 parallel.recompute=none")
    found = remedies(plan, device_memory(plan.config.cluster, plan.world_size))
    arguments = [argument for remedy in found for argument in remedy.arguments()]
    # Not full, nor moe_activation, which is too little.
    assert "parallel.recompute=moe_feed_forward" in arguments
    assert all(remedy.plan.world_size == plan.world_size for remedy in found)


def test_several_go_together_where_none_is_enough():
    plan = plan_of("experiment=spikingbrain_7b_8k cluster=a800 parallel=tp2 stage.micro_batch_size=8")
    device = device_memory(plan.config.cluster, plan.world_size)
    assert all(device.fit(remedy.needed) is not Fit.fits for remedy in remedies(plan, device))
    combined = together(remedies(plan, device), device)
    assert len(combined.settings) > 1 and device.fit(combined.needed) is Fit.fits


def test_nothing_is_named_that_a_run_refuses():
    # 3 KV groups and 9 heads divide by no 2 or 4; 30 layers divide by 2, not by 4.
    plan = plan_of("model=smollm2_135m_hybrid cluster=a800 cluster.memory_gib=1 stage.seq_length=1024")
    arguments = [" ".join(remedy.arguments()) for remedy in remedies(plan, DeviceMemory(GIB, ""))]
    assert any("pipeline_model_parallel_size=2" in text for text in arguments)
    assert not any("tensor" in text or "pipeline_model_parallel_size=4" in text for text in arguments)


class TestRealRun:
    def test_it_is_warned_where_the_estimate_is_more_than_the_device_has(self):
        plan = plan_of(SINGLE)
        text = memory_warning(plan.config, 1, None)
        assert text.startswith("warning: the fullest rank needs about 212.1 GiB") and "64.0 GiB" in text
        assert "parallel.tensor_model_parallel_size=4" in text

    def test_the_device_speaks_where_nothing_is_stated(self):
        plan = plan_of("experiment=spikingbrain_7b_8k cluster=nvidia")
        assert "as the device says" in memory_warning(plan.config, plan.world_size, 16 * GIB)
        assert memory_warning(plan.config, plan.world_size, 24 * GIB) is None  # tight is no warning
        assert memory_warning(plan.config, plan.world_size, None) is None

    def test_a_distributed_optimizer_is_a_remedy_where_there_are_replicas(self):
        config = plan_of("experiment=spikingbrain_7b_8k cluster=c550").config
        config = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, use_distributed_optimizer=False)
        )
        plan = plan_run(config, 32)
        found = {tuple(remedy.arguments()): remedy for remedy in remedies(plan, DeviceMemory(30 * GIB, ""))}
        saved = plan.fullest.memory.total - found[("parallel.use_distributed_optimizer=true",)].needed
        assert saved == plan.fullest.parameters * 12 * 7 / 8

    def test_fsdp_is_a_remedy_where_ranks_hold_the_same_layers(self):
        """With what it needs beside it, and not where a pipeline splits the model."""
        config = plan_of("experiment=spikingbrain_7b_128k cluster=c550").config
        plan = plan_run(config, 256)
        found = {tuple(remedy.arguments()): remedy for remedy in remedies(plan, DeviceMemory(30 * GIB, ""))}
        remedy = found["parallel.engine=fsdp", "parallel.overlap_param_gather=false"]
        assert remedy.needed < 0.5 * plan.fullest.memory.total
        piped = plan_of("experiment=spikingbrain_7b_8k cluster=c550", "parallel=dp8_pp4")
        arguments = [each.arguments() for each in remedies(piped, DeviceMemory(10 * GIB, ""))]
        assert arguments and not any("parallel.engine=fsdp" in each for each in arguments)
