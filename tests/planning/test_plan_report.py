"""What a dry run shows of a plan, for people and for programs."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from spikingbrain_train.planning import launch
from spikingbrain_train.planning.costs import total_parameters
from spikingbrain_train.planning.plan_report import report
from spikingbrain_train.planning.plan_report.cluster import expected_kernels
from spikingbrain_train.planning.plan_report.report import as_values, render
from spikingbrain_train.planning.plan_report.section import Section
from tests.planning.runs import plan_of

RUNS = {
    "7B": "experiment=spikingbrain_7b_8k cluster=c550",
    "7B, one device": "experiment=spikingbrain_7b_8k cluster=a800 parallel=single",
    "76B, 8k": "experiment=spikingbrain_76b_8k cluster=h100",
    "76B, 8k, nothing recomputed": "experiment=spikingbrain_76b_8k cluster=c550 parallel.recompute=none",
    "76B, 128k": "experiment=spikingbrain_76b_128k cluster=metax",
    "SmolLM2": "model=smollm2_135m_hybrid stage.seq_length=1024 cluster=cpu",
    "align": "experiment=smollm2_align model=smollm2_135m_hybrid cluster=h200",
    "tiny": "model=tiny_76b stage.seq_length=256 cluster=cpu",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("run", RUNS)
def test_a_plan_fits_its_columns(run):
    plan = plan_of(RUNS[run])
    for width in (100, 110, 120):
        assert max(map(len, render(plan, width).splitlines())) <= width
    facts = render(plan, 80).partition("\n\n")[0]  # tables are wider
    assert max(map(len, facts.splitlines())) <= 80


def test_equal_layers_are_one_row():
    text = render(plan_of(RUNS["7B"]), 100)
    assert re.search(r"^0-26 even +14 +gla +dense", text, re.M)
    assert re.search(r"^1-27 odd +14 +swa +dense", text, re.M)


def test_layers_of_the_table_are_those_of_the_model():
    for run in RUNS:
        plan = plan_of(RUNS[run])
        numbers = [number for group in as_values(plan)["layers"] for number in group["layers"]]
        assert sorted(numbers) == list(range(plan.config.model.num_layers))


def test_metax_is_not_nvidia():
    run = "experiment=spikingbrain_76b_8k"
    nvidia, metax = (render(plan_of(run, f"cluster={name}"), 120) for name in ("nvidia", "metax"))
    for text, words in (
        (nvidia, ["NVIDIA GPUs, collectives over NCCL", "transformer_engine", "than 10 minutes"]),
        (metax, ["MetaX GPUs, collectives over MCCL", "linears megatron", "grouped_gemm", "than 30 minutes"]),
    ):
        assert all(word in text for word in words)
        assert "memory not stated: cluster.memory_gib=..." in text and "cluster.peak_tflops=..." in text
    assert "transformer_engine" not in metax


def test_kernels_that_cannot_do_a_call_are_not_expected():
    # flash-attn has no window behind sinks.
    plan = plan_of("experiment=spikingbrain_76b_8k cluster=nvidia")
    assert list(expected_kernels(plan)["softmax_attention"]) == ["flash_attn", "flex"]


@pytest.mark.parametrize(("seen", "words"), [(True, "NVIDIA GPUs"), (False, "CPUs, collectives over gloo")])
def test_auto_says_what_this_machine_shows(seen, words, monkeypatch):
    monkeypatch.setattr(launch, "has_gpu_device", lambda: seen)
    text = render(plan_of("model=tiny_hybrid cluster=auto"), 120)
    assert f"auto: {words}" in text and ("a GPU" if seen else "no GPU") in text


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would_help():
    text = render(plan_of(RUNS["76B, 8k, nothing recomputed"]), 120)
    words = " ".join(text.split())
    assert "the fullest rank (stage 0) needs 85.04 GiB" in words and "it does not fit" in words
    rows = [line for line in text.splitlines() if line.endswith("too much") or line.endswith("fits")]
    assert "21.04 too much" in rows[0] and rows[3].endswith("fits")
    assert any("parallel.recompute=moe_feed_forward" in row and "55.08" in row for row in rows)


def test_a_plan_says_what_unbalanced_experts_keep_at_most():
    plan = plan_of(
        "experiment=spikingbrain_76b_8k parallel.recompute=none parallel.recompute_expert_tokens=4096"
    )
    # 2 of 16 experts on each of 8 expert ranks: gate, up and product of 18944 channels in bf16.
    most = 2 * 4096 * 3 * 18944 * 2
    words = " ".join(render(plan, 120).split())
    assert f"keep at most {most / 2**20:.1f} MiB of a micro-batch: those with more than 4,096 tokens" in words
    assert as_values(plan)["memory"]["most_kept_by_experts_bytes"] == most


@pytest.mark.parametrize(
    ("recompute", "kept"),
    [("none", "for every layer and micro-batch on its way"), ("full", "while that layer is computed")],
)
def test_a_plan_says_what_copies_of_busy_experts_take(recompute: str, kept: str):
    plan = plan_of(
        f"experiment=spikingbrain_76b_8k parallel.recompute={recompute} parallel.replicate_expert_load=2.5"
    )
    copies = as_values(plan)["memory"]["copies_of_experts"]
    # 6 of 16 experts above 2.5 times the mean have more than 15 of 16 means; 7 would have more than all.
    assert copies["most"] == 6
    model = plan.config.model
    one_more = replace(model, moe=replace(model.moe, num_experts=model.moe.num_experts + 1))
    layers = model.layer_feed_forwards().count("moe")
    an_expert = (total_parameters(one_more) - total_parameters(model)) / layers - model.hidden_size  # router
    assert copies["bytes"] == 2 * an_expert
    words = " ".join(render(plan, 120).split())
    taken = f"{copies['bytes'] / 2**20:.1f} MiB a copied expert on each rank"
    assert f"{taken}, at most 6 in a layer, {kept}" in words


def test_a_tight_plan_is_called_tight():
    plan = plan_of("experiment=spikingbrain_7b_8k cluster=c550 cluster.memory_gib=24")
    text = render(plan, 120)
    assert "it is tight" in " ".join(text.split()) and "what would help" in text
    assert as_values(plan)["memory"]["fit"] == "tight"


def test_the_json_form_has_the_numbers_of_the_plan():
    plan = plan_of(RUNS["76B, 8k, nothing recomputed"])
    values = json.loads(json.dumps(as_values(plan)))
    assert list(values) == ["run", "cluster", "time", "layers", "memory"]
    assert values["run"]["flops_per_token"] == plan.flops_per_token
    assert [stage["total_bytes"] for stage in values["memory"]["stages"]] == [
        stage.memory.total for stage in plan.stages
    ]
    assert values["memory"]["fit"] == "does not fit"
    assert {"settings", "ranks", "total_bytes", "fit"} == set(values["memory"]["remedies"][0])
    assert values["cluster"]["kernels"]["parallel_linear"] == {"megatron": []}
    assert values["time"]["speed"]["kind"] == "assumed"


def test_another_part_of_the_package_adds_a_section(monkeypatch):
    own = Section("weather", {"rain": 0.5}, lambda width: ["weather  fine"])
    made = [lambda plan: own, lambda plan: None]
    monkeypatch.setattr(report, "SECTIONS", [*report.SECTIONS, *made])
    plan = plan_of(RUNS["tiny"])
    assert render(plan, 100).endswith("\n\nweather  fine")
    assert as_values(plan)["weather"] == {"rain": 0.5}


def test_pipeline_stages_that_are_alike_are_one_row():
    # One micro-batch: every stage holds one, and those in the middle have neither vocabulary nor sinks.
    settings = "model.num_layers=8 model.mixers=[swa] stage.global_batch_size=1 stage.micro_batch_size=1"
    plan = plan_of("model=tiny_hybrid cluster=cpu parallel.pipeline_model_parallel_size=4", settings)
    assert re.search(r"^1-2 +2-5 ", render(plan, 100), re.M)
