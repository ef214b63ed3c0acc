"""Everything in conf/ composes, and runs as far as a plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import pytest
from hydra import compose, initialize_config_dir

from spikingbrain_train.config.compose import groups, register_schema
from spikingbrain_train.config.load import load_conversion, to_run_config
from spikingbrain_train.config.model import FeatureMap, GateKind
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.costs import active_parameters, total_parameters
from spikingbrain_train.planning.fit import Fit, device_memory
from spikingbrain_train.planning.plan_report.report import render
from spikingbrain_train.planning.planner import launched_world_size, plan_run

YAML_FILES = sorted(conf_folder().rglob("*.yaml"))
CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]


@pytest.fixture(scope="module", autouse=True)
def hydra_in_conf():
    register_schema()
    with (
        initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("WORLD_SIZE", raising=False)
        yield


@functools.cache
def dry_run(*overrides: str) -> RunConfig:
    """Compose, check and plan."""
    config = to_run_config(compose("config", overrides=[*overrides, "dry_run=true"]))
    world_size = launched_world_size(config)
    check_run_config(config, world_size)
    assert render(plan_run(config, world_size))
    return config


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(conf_folder())))
def test_every_file_says_what_it_is_for(path):
    comments = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert any(len(comment) > 20 and "@package" not in comment for comment in comments)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_choice_makes_a_plan(group, choice):
    if choice == "from_checkpoint":
        return  # test_stored_model.py has a checkpoint for it
    overrides = [f"{group}={choice}"]
    if group == "parallel":
        overrides.append("stage.global_batch_size=128")  # as many as the largest number of replicas
    if group == "parallel" and "ep" in choice:
        overrides += ["model=tiny_76b", "model.moe.num_experts=8"]
    elif group not in ("model", "experiment"):
        overrides.append("model=tiny_hybrid")
    elif choice in ("smollm2_align", "smollm2_cpt"):
        overrides.append("model=smollm2_135m_hybrid")
    if choice in ("align", "distill"):
        overrides.append("stage.teacher=dense")
    if choice.startswith("prosparse"):
        overrides += ["model.activation_func=relu", "model.max_position_embeddings=4096"]
    if choice == "adamw_wsd":
        overrides.append("optimizer.lr_wsd_decay_iters=100")
    if choice == "falcon_mamba_wsd":
        overrides += ["stage.train_iters=1000", "optimizer.lr_wsd_decay_iters=100"]
    dry_run(*overrides)


def test_an_experiment_wins_over_the_groups_and_the_command_line_over_both():
    config = dry_run("experiment=spikingbrain_7b_8k", "stage.micro_batch_size=1")
    assert config.model.layer_mixers() == [("gla",), ("swa",)] * 14
    assert config.parallel.data_parallel_size == 8 and config.parallel.pipeline_model_parallel_size == 4
    assert config.stage.seq_length == 8192 and config.stage.micro_batch_size == 1


@pytest.mark.parametrize(
    ("choice", "parameters"),
    [
        # Counted by transformers over the published models' configs.
        ("smollm2_135m", 134_515_008),
        ("qwen2_5_7b", 7_615_616_512),
        ("mamba_130m", 129_135_360),
        ("falcon_mamba_7b", 7_272_665_088),
        ("bitnet_2b4t", 2_412_820_480),
    ],
)
def test_sizes_are_the_published_ones(choice, parameters):
    assert total_parameters(dry_run(f"model={choice}").model) == parameters


EXPERIMENTS = {
    # replicas, tensor, pipeline, context, expert ranks; length; billions of tokens (sections 3.4 and 4)
    "spikingbrain_7b_8k": ((8, 1, 4, 1, 1), 8192, 100),
    "spikingbrain_7b_32k": ((32, 1, 1, 2, 1), 32768, 25),
    "spikingbrain_7b_128k": ((32, 1, 1, 8, 1), 131072, 25),
    "spikingbrain_76b_8k": ((128, 1, 4, 1, 8), 8192, 100),
    "spikingbrain_76b_32k": ((128, 1, 4, 4, 8), 32768, 30),
    "spikingbrain_76b_128k": ((128, 1, 4, 8, 8), 131072, 30),
    # ours: before the published stages, and layouts beside the published ones
    "spikingbrain_7b_align": ((8, 1, 1, 1, 1), 4096, 0.06554),
    "spikingbrain_7b_distill": ((4, 2, 1, 1, 1), 8192, 1),
    "spikingbrain_76b_align": ((8, 1, 1, 1, 8), 4096, 0.06554),
    "spikingbrain_76b_distill": ((32, 1, 4, 1, 8), 8192, 1),
    # fine-tuning, of which samples and length are published; other stages have the layout of the first
    "spikingbrain_7b_sft1": ((8, 1, 4, 1, 1), 8192, 0.35022),
    "spikingbrain_7b_sft3_32k": ((32, 1, 1, 2, 1), 32768, 0.89968),
    "spikingbrain_76b_sft1": ((128, 1, 4, 1, 8), 8192, 0.35022),
    "spikingbrain_76b_sft3_32k": ((32, 1, 4, 4, 8), 32768, 0.89968),
    "spikingbrain_7b_8k parallel=dp4_tp2": ((4, 2, 1, 1, 1), 8192, 100),
    "spikingbrain_7b_32k parallel=dp4_tp2": ((4, 2, 1, 1, 1), 32768, 25),
    "spikingbrain_7b_128k parallel=cp4_tp2": ((1, 2, 1, 4, 1), 131072, 25),
    "spikingbrain_7b_128k parallel=dp32_cp8_zero2": ((32, 1, 1, 8, 1), 131072, 25),
    "spikingbrain_7b_128k parallel=dp32_cp8_halo": ((32, 1, 1, 8, 1), 131072, 25),
    "spikingbrain_76b_32k parallel=dp32_cp4_ep8_pp4": ((32, 1, 4, 4, 8), 32768, 30),
    "spikingbrain_76b_128k parallel=dp16_cp8_ep8_pp4": ((16, 1, 4, 8, 8), 131072, 30),
}


@pytest.mark.parametrize("cluster", ["nvidia", "metax"])
@pytest.mark.parametrize("choice", EXPERIMENTS)
def test_published_topologies_make_a_plan_on_both_platforms(choice, cluster):
    degrees, seq_length, billions = EXPERIMENTS[choice]
    config = dry_run(*f"experiment={choice}".split(), f"cluster={cluster}")
    parallel = config.parallel
    assert degrees == (
        parallel.data_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
    )
    assert parallel.use_distributed_optimizer
    plan = plan_run(config, launched_world_size(config))
    assert config.stage.seq_length == seq_length
    assert plan.total_tokens == pytest.approx(billions * 1e9, rel=1e-3)
    # MetaX's C550 has 64 GiB; a tenth is for what the estimate leaves out (workspaces, NCCL, fragments).
    c550 = device_memory(dry_run("model=tiny_hybrid", "cluster=c550").cluster, 1)
    assert c550 is not None and c550.bytes == 64 * 2**30
    assert c550.fit(plan.fullest.memory.total) is Fit.fits


@pytest.mark.parametrize(
    ("choice", "replicas", "seq_length", "billions"),
    [
        ("falcon_mamba_7b", 128, 2048, 145.7),  # the first stage; the ramp has 128 sequences at first
        ("mamba_130m", None, 2048, 2.517),  # arXiv 2312.00752, appendix E.2: 4800 steps of 0.5M tokens
        ("bitnet_2b4t", 64, 4096, 4000),  # arXiv 2504.12285
    ],
)
def test_training_from_nothing_reads_the_published_tokens_and_fits(choice, replicas, seq_length, billions):
    config = dry_run(f"experiment={choice}", "cluster=h100")
    plan = plan_run(config, launched_world_size(config))
    assert (config.parallel.data_parallel_size, config.stage.seq_length) == (replicas, seq_length)
    assert plan.total_tokens == pytest.approx(billions * 1e9, rel=1e-3)
    memory = device_memory(config.cluster, 1)
    assert memory is not None and memory.fit(plan.fullest.memory.total) is Fit.fits


def test_falcon_mamba_decays_over_the_published_share_of_its_steps():
    config = dry_run("experiment=falcon_mamba_7b")
    share = config.optimizer.lr_wsd_decay_iters / config.stage.train_iters
    assert share == pytest.approx(500 / 5500, rel=0.02)
    assert config.optimizer.lr / config.optimizer.min_lr == 256
    ramp = config.stage.batch_size_ramp
    assert (ramp.start, config.stage.global_batch_size) == (128, 2048)
    assert ramp.samples * config.stage.seq_length == pytest.approx(50e9, rel=1e-6)


def _topologies(page):
    """The table of topologies of a page: command-line choice -> its cells."""
    rows, experiment = {}, ""
    for line in (conf_folder().parent / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name := re.match(r"`(spikingbrain_\w+)`", cells[0]):
            experiment = name[1]
            rows[experiment] = cells
        elif variant := re.match(r"\.\.\. `(parallel=\w+)`", cells[0]):
            rows[f"{experiment} {variant[1]}"] = cells
    return rows


def test_every_topology_is_in_the_table():
    assert _topologies("docs/topologies.md").keys() == EXPERIMENTS.keys()


@pytest.mark.parametrize("page", ["docs/topologies.md", "docs/guides/own_model.md"])
def test_pages_give_the_planners_numbers(page):
    rows = _topologies(page)
    assert rows
    for choice, (_, gpus, _, step, _, gib) in rows.items():
        config = dry_run(*f"experiment={choice}".split())
        plan = plan_run(config, launched_world_size(config))
        fullest = max(stage.memory.total for stage in plan.stages) / 2**30
        assert int(gpus) == plan.world_size, choice
        stage = config.stage
        assert step == f"{stage.seq_length // 1024}k x {stage.global_batch_size}", choice
        assert int(gib.split()[0]) == round(fullest), choice


def test_the_tokens_of_all_stages_are_those_of_table_2():
    for model, billions in (("spikingbrain_7b", 150), ("spikingbrain_76b", 160)):
        stages = [dry_run(f"experiment={model}_{length}") for length in ("8k", "32k", "128k")]
        plans = [plan_run(config, launched_world_size(config)) for config in stages]
        assert sum(plan.total_tokens for plan in plans) == pytest.approx(billions * 1e9, rel=1e-3)


def test_published_layouts_use_the_published_communication():
    # Section 4: Ulysses in the 7B; in training of the 76B Ulysses for softmax, LASP-2 for linear branches.
    for experiment, linear in (
        ("spikingbrain_7b_128k", "ulysses"),
        ("spikingbrain_76b_32k", "allgather"),
        ("spikingbrain_76b_128k", "allgather"),
    ):
        method = dry_run(f"experiment={experiment}").parallel.context_parallel
        assert (method.gated_linear_attention.name, method.sliding_window_attention.name) == (
            linear,
            "ulysses",
        )
        assert method.head_padding


def test_the_stages_of_a_model_follow_each_other():
    for model in ("spikingbrain_7b", "spikingbrain_76b"):
        stages = [dry_run(f"experiment={model}_{length}") for length in ("8k", "32k", "128k")]
        for before, after in itertools.pairwise(stages):
            assert after.checkpoint.load == f"{before.output_dir}/checkpoints"
            assert after.model == before.model


def test_alignment_and_distillation_of_the_7b_lead_from_the_conversion_to_the_published_stages():
    align, distill, cpt = (
        dry_run(f"experiment=spikingbrain_7b_{name}") for name in ("align", "distill", "8k")
    )
    assert align.checkpoint.load == cpt.checkpoint.load  # with them or without, as in the report
    assert distill.checkpoint.load == f"{align.output_dir}/checkpoints"
    assert align.stage.teacher == distill.stage.teacher and align.stage.teacher is not None
    assert align.model == distill.model == cpt.model
    assert distill.stage.seq_length == cpt.stage.seq_length
    assert align.model.sliding_window is not None and align.stage.seq_length <= align.model.sliding_window


def test_spikingbrain_76b_has_the_published_size_and_layers():
    model = dry_run("model=spikingbrain_76b").model
    mixers = {layer: mixer for layer, mixer in enumerate(model.layer_mixers(), start=1)}
    assert {layer for layer, mixer in mixers.items() if mixer == ("gla", "full")} == {7, 14, 21, 28}
    assert set(mixers.values()) == {("gla", "full"), ("gla", "swa")}
    dense = [n for n, kind in enumerate(model.layer_feed_forwards(), start=1) if kind == "dense"]
    assert dense == [1, 2, 3, 5, 7, 9, 11]
    assert (model.moe.num_experts, model.moe.router_topk, model.moe.num_shared_experts) == (16, 1, 1)
    assert (model.gla.feature_map, model.gla.gate) == (FeatureMap.sigmoid, GateKind.tied)
    assert (model.num_sink_tokens, model.sliding_window) == (128, 4096)
    assert 76e9 < total_parameters(model) < 77e9
    assert 12e9 < active_parameters(model) < 13e9


def test_the_tiny_76b_has_every_part_of_the_large_one():
    tiny, large = (dry_run(f"model={choice}").model for choice in ("tiny_76b", "spikingbrain_76b"))
    for model in (tiny, large):
        assert set(model.layer_mixers()) == {("gla", "swa"), ("gla", "full")}
        assert set(model.layer_feed_forwards()) == {"dense", "moe"}
        assert model.gla == large.gla and model.num_sink_tokens > 0
    assert total_parameters(tiny) < 1e6


@pytest.mark.parametrize("name", ["spikingbrain_76b", "spikingbrain_76b_exact"])
def test_the_76b_recipes_make_the_76b_model_of_its_dense_source(name):
    recipe = load_conversion(name)
    source, model = dry_run("model=qwen2_5_7b").model, dry_run("model=spikingbrain_76b").model
    parts = ("mixers", "sliding_window", "gla", "parallel_hybrid", "num_sink_tokens", "feed_forwards", "moe")
    swapped = {part: getattr(recipe, part) for part in (*parts, "spiking")}
    assert dataclasses.replace(source, **swapped) == model
    assert recipe.upcycling.form.name == ("exact" if name.endswith("exact") else "published")


def test_hybrid_models_are_their_dense_source_in_the_published_pattern():
    recipe = load_conversion("spikingbrain_7b")
    for dense, hybrid in (("smollm2_135m", "smollm2_135m_hybrid"), ("qwen2_5_7b", "spikingbrain_7b")):
        source, model = dry_run(f"model={dense}").model, dry_run(f"model={hybrid}").model
        source.mixers, source.sliding_window, source.gla = recipe.mixers, recipe.sliding_window, recipe.gla
        assert model == source


@pytest.mark.parametrize(
    ("name", "mixers"), [("gdn", ["gdn", "swa"]), ("mamba", ["mamba", "swa"]), ("bitnet", ["full"])]
)
def test_recipes_of_other_systems_change_what_they_are_named_after(name, mixers):
    recipe = load_conversion(name)
    assert recipe.mixers == mixers
    linears = ["qkv", "attention_output", "mlp_fc1", "mlp_fc2"] if name == "bitnet" else []
    for transform in (recipe.ternary, recipe.int8_inputs):
        assert [projection.name for projection in transform.projections] == linears
    assert recipe.mamba.use_bias is (name == "mamba")
