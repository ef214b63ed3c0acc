"""The pipelines of the published models: planned and checked, never run."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.command_line import pipelines
from spikingbrain_train.pipelines.steps import Step
from spikingbrain_train.planning.planner import launched_world_size
from tests.pipelines.planned import steps_of

MODELS = ("spikingbrain_7b", "spikingbrain_76b")
GIVEN = (
    *("model=m", "train=[t]", "valid=[v]"),
    *("foundational=[sft1]", "chat=[sft2]", "reasoning=[sft3]"),
)
LENGTHS = {
    **{"align": 4096, "distill": 8192, "cpt_8k": 8192, "cpt_32k": 32768, "cpt_128k": 131072},
    **{"sft1": 8192, "sft2": 8192, "sft3": 8192},
}
"""Stage -> tokens of a sequence."""
LONG_REASONING = {
    "spikingbrain_7b": ("reasoning_stage=spikingbrain_7b_sft3_32k", "reasoning_nodes=8"),
    "spikingbrain_76b": ("reasoning_stage=spikingbrain_76b_sft3_32k",),
}
"""Arguments that read chains of reasoning whole."""
GPUS_OF_A_NODE = 8


@cache
def planned(model: str, *arguments: str) -> dict[str, Step]:
    """The steps of a model's pipeline, with all that has to be given."""
    return steps_of(model, "output=out", "cluster=metax", *GIVEN, *arguments)


@cache
def stages(model: str, *arguments: str) -> dict[str, RunConfig]:
    """The configs of its training steps."""
    return {
        name: to_run_config(
            # Neither the source nor what is made of it is here.
            compose_run([*_settings(step), "dry_run=true", "checkpoint.load=null", "stage.teacher=null"])
        )
        for name, step in planned(model, *arguments).items()
        if step.train_iters is not None
    }


def _settings(step: Step) -> list[str]:
    """The words of its command from the experiment on."""
    first = next(n for n, word in enumerate(step.command) if word.startswith("experiment="))
    return step.command[first:]


@pytest.mark.parametrize("model", MODELS)
class TestPublishedPipeline:
    def test_dry_run_on_a_laptop_lists_all_steps_and_all_that_is_missing(
        self,
        model: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
        pipelines(["dry-run", model, "valid=[held_out]"])
        said = capsys.readouterr().out
        for step in ("dense", "hybrid", "evaluate_dense", *LENGTHS, "picture"):
            assert f"] {step}: " in said
        assert f"scripts/slurm/nvidia.sbatch experiment={model}_128k" in said
        assert f"train --nproc-per-node 8 experiment={model}_align" in said
        missing = [line for line in said.splitlines() if line.startswith("missing: ")]
        unset = "model, train, foundational, chat, reasoning have no value; give model=... train=... "
        assert any(unset in line for line in missing)
        submitted = ", ".join(name for name in LENGTHS if name != "align")
        assert any(f"step {submitted}: the program sbatch is not installed" in line for line in missing)
        assert any("held_out.bin does not exist" in line for line in missing)
        assert len(missing) == 3
        assert not list(tmp_path.iterdir())

    def test_stages_read_each_other_and_the_published_lengths(self, model: str) -> None:
        steps = planned(model)
        assert {name: config.stage.seq_length for name, config in stages(model).items()} == LENGTHS
        before = "out/hybrid"
        for name in LENGTHS:
            assert f"checkpoint.load={before}" in steps[name].command
            before = f"out/{name}/checkpoints"
            if name != "align":
                assert "scripts/slurm/metax.sbatch" in steps[name].command
        for name, data in (("cpt_8k", "t"), ("sft1", "sft1"), ("sft2", "sft2"), ("sft3", "sft3")):
            assert f"data.train=[{data}]" in steps[name].command

    @pytest.mark.parametrize("long_reasoning", [False, True])
    def test_every_job_asks_for_the_nodes_of_its_layout(self, model: str, long_reasoning: bool) -> None:
        arguments = LONG_REASONING[model] if long_reasoning else ()
        steps, configs = planned(model, *arguments), stages(model, *arguments)
        for name in LENGTHS.keys() - {"align"}:
            nodes = re.search(r"--nodes=(\d+) ", " ".join(steps[name].command))
            assert nodes is not None, name
            assert int(nodes[1]) * GPUS_OF_A_NODE == launched_world_size(configs[name]), name
        assert configs["sft3"].stage.seq_length == (32768 if long_reasoning else 8192)

    def test_every_pretraining_stage_knows_the_sources_tokens(self, model: str) -> None:
        for name, config in stages(model).items():
            if not name.startswith("sft"):
                assert config.data.source_tokens == 18e12, name

    def test_a_layout_that_does_not_fit_the_ranks_is_refused(self, model: str) -> None:
        with pytest.raises(ConfigurationError, match="step align: "):
            steps_of(model, *GIVEN, "nproc_per_node=3", "steps.align.settings.parallel=tp2")

    def test_one_node_takes_the_place_of_slurm(self, model: str) -> None:
        steps = steps_of(model, "steps.cpt_8k.launch=null", "steps.cpt_8k.nproc_per_node=8")
        assert steps["cpt_8k"].command[1:5] == ["-m", "spikingbrain_train", "train", "--nproc-per-node"]


def test_the_7b_ends_with_an_export_that_is_evaluated_and_whose_spikes_are_counted() -> None:
    steps = planned("spikingbrain_7b")
    assert steps["export"].reads["checkpoint"] == "out/sft3/checkpoints"
    for step in ("evaluate_export", "spikes"):
        assert steps[step].reads["model"] == steps["export"].outputs["model"]
        assert steps[step].reads["data[0]"] == "v.bin"
    assert steps["spikes"].outputs == {"result": "out/spikes/spikes.json", "page": "out/spikes/spikes.html"}


def test_the_76b_ends_with_an_export_and_an_evaluation_of_the_checkpoint_on_the_ranks_of_a_node() -> None:
    steps = planned("spikingbrain_76b")
    assert steps["export"].reads["checkpoint"] == "out/sft3/checkpoints"
    command = " ".join(steps["evaluate"].command)
    assert "evaluate --nproc-per-node 8 --parallel expert_model_parallel_size=8 " in command
    assert "--model out/sft3/checkpoints " in command


def test_the_76b_trains_its_linear_branches_alone_before_the_published_stages() -> None:
    configs = stages("spikingbrain_76b")
    dropped = {name: config.model.parallel_hybrid.softmax_dropout for name, config in configs.items()}
    assert dropped == {name: 0.5 if name in ("align", "distill") else 0.0 for name in LENGTHS}
