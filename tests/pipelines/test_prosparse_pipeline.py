"""ProSparse as one pipeline: planned with both published schedules, and run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.evaluation.text_windows import windows_of_data
from spikingbrain_train.pipelines.pipeline_file import load_pipeline
from spikingbrain_train.pipelines.plan import plan_pipeline
from spikingbrain_train.pipelines.steps import Step
from tests.pipelines.planned import steps_of
from tests.pipelines.tiny_runs import read, run_to_its_end
from tests.programs import Programs
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

GIVEN = ("model=source", "text=[text.jsonl]", "output=out")
LENGTH, WINDOWS, BUDGET = 64, 8, 0.02
OF_ZEROS = 1e-3
"""As in tests/activation_sparsity: a gate that is almost at the threshold lies on either side of it."""
L1 = '"stage.sparsity.l1_factors=[0, 0.05, 0.2]", "stage.sparsity.l1_end_steps=[1, 3, 5]"'
TINY = (
    *(f"seq_length={LENGTH}", f"windows={WINDOWS}", f"loss_budget={BUDGET}"),
    *("valid_tokens=1024", "lr=1e-2", "min_lr=1e-3", "steps.text.workers=1"),
    # Not in what this CPU multiplies: numbers are held to those of float32.
    *(f"steps.{step}.dtype=float32" for step in ("evaluate_relu", "evaluate_export", "sparsity")),
    f"train=[stage.train_iters=6, stage.seq_length={LENGTH}, stage.global_batch_size=2, {L1}, "
    "logging.log_interval=1]",
)
NEXT_STAGE = """\
output: out
steps:
  relu: {kind: convert, hf: source, conversion: prosparse}
  fit:
    kind: analyze_sparsity
    model: ${steps.relu.checkpoint}
    data: [text]
    fit_threshold: true
  sft:
    kind: train
    settings:
      stage: cpt
      model: from_checkpoint
      model.activation_func: fatrelu
      model.fatrelu_threshold: ${steps.fit.fitted_threshold}
      checkpoint.load: ${steps.relu.checkpoint}
      data.train: [text]
"""


@pytest.fixture
def workplace(workplace: Path) -> Path:
    """And tokens, and a stage that follows."""
    (workplace / "text.bin").touch()
    (workplace / "next.yaml").write_text(NEXT_STAGE)
    return workplace


@pytest.mark.parametrize(("stage", "iterations"), [("prosparse_7b", 16500), ("prosparse_minicpm_1b", 35000)])
def test_published_schedules_are_planned(workplace: Path, stage: str, iterations: int) -> None:
    steps = steps_of("prosparse", *GIVEN, f"stage={stage}")
    assert steps["sparsify"].train_iters == iterations
    assert steps["fatrelu"].command[-1] == f"fatrelu_threshold={ModelConfig.fatrelu_threshold}"
    assert [name for name, step in steps.items() if step.values] == ["fit"]


def test_a_fitted_threshold_takes_the_place_of_the_assumed_one(workplace: Path) -> None:
    """Also in a stage that follows; without a fit there is none to refer to."""
    assert "model.fatrelu_threshold=0.01" in steps_of("next.yaml")["sft"].command
    (workplace / "out/fit").mkdir(parents=True)
    (workplace / "out/fit/sparsity.json").write_text('{"threshold": 0.0, "fitted_threshold": 0.0375}')
    file = load_pipeline("next.yaml")
    planned = plan_pipeline(file, lambda step: step.name == "fit", incomplete=True)
    sft: Step = planned.steps[-1]
    assert "model.fatrelu_threshold=0.0375" in sft.command
    with pytest.raises(ConfigurationError, match=r"fitted_threshold} is not an output of fit; it has result"):
        steps_of("next.yaml", "steps.fit.fit_threshold=false")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["loss_budget=-0.1"], "step fit: --loss-budget is -0.1; give nats per token of at least 0"),
        (["steps.fit.fit_threshold=false"], "step fit: --loss-budget is read with --fit-threshold only"),
        (["steps.fit.thresholds=[0.1, 0]"], "step fit: --thresholds are to rise; give --thresholds 0 0.1"),
        (["windows=0"], "step evaluate_dense: --max-windows is 0; give at least 1"),
        (
            ["steps.relu.conversion=dense"],
            "step sparsify: stage.sparsity.l1_factors=[0,0.005,0.05,0.05,0.2,0.2] pulls what is inside",
        ),
        (["train=[stage.train_iters=100]"], "step sparsify: stage.sparsity.l1_end_steps="),
    ],
)
def test_what_would_be_refused_after_the_training_is_refused_before(
    workplace: Path, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SpikingBrainError) as refusal:
        steps_of("prosparse", *GIVEN, *arguments)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_source_that_is_not_there_yet_is_not_refused(workplace: Path) -> None:
    """What its feed-forwards compute is known when it is there."""
    steps = steps_of("prosparse", "text=[text.jsonl]", "steps.relu.conversion=dense", "model=nowhere")
    recipes = [each["relu"].recipe for each in (steps, steps_of("prosparse", *GIVEN))]
    found = [recipe and recipe.activation_func for recipe in recipes]
    assert None not in recipes and found == [None, ActivationFunc.relu]


@pytest.fixture(scope="module")
def done(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that has run to its end."""
    folder = tmp_path_factory.mktemp("prosparse")
    save_small_source(folder / "source")
    run_to_its_end(programs, "prosparse", (*GIVEN, *TINY), folder, steps=11)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestTinyRun:
    def test_the_l1_loss_rises_as_its_schedule_says(self, done: Path) -> None:
        lines = [json.loads(line) for line in (done / "out/sparsify/metrics.jsonl").read_text().splitlines()]
        factors = [line["ffn/l1_factor"] for line in lines if "train/loss" in line]
        assert factors[0] == 0 and factors[-1] == 0.2 and factors == sorted(factors)

    def test_the_fitted_threshold_is_the_exports(self, done: Path) -> None:
        fit = read(done / "out/fit/sparsity.json")
        threshold = fit["fitted_threshold"]
        assert threshold == fit["fit"]["threshold"] != ModelConfig.fatrelu_threshold
        config = read(done / "out/export/config.json")
        assert (config["hidden_act"], config["hidden_act_param"]) == ("fatrelu", threshold)
        costs = {
            each["threshold"]: each["cross_entropy"] - fit["cross_entropy"] for each in fit["thresholds"]
        }
        assert costs[threshold] <= BUDGET < costs[fit["fit"]["refused"]]
        records = read(done / "out/pipeline_state.json")
        assert f"fatrelu_threshold={threshold}" in json.dumps(records)

    @torch.no_grad()
    def test_transformers_own_class_with_that_threshold_says_the_same(self, done: Path) -> None:
        """Qwen2 with ReLU, as trained, whose gates are closed by hand."""
        threshold = read(done / "out/fit/sparsity.json")["fitted_threshold"]
        model = AutoModelForCausalLM.from_pretrained(done / "out/export_relu", dtype=torch.float32)
        assert type(model).__module__.startswith("transformers.")
        prefix = str(done / "out/text/text_valid")
        windows = torch.tensor(windows_of_data([prefix], done / "source", MODEL_VOCAB_SIZE, WINDOWS, LENGTH))

        def loss() -> float:
            logits = model(windows[:, :-1]).logits
            return float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))

        relu = read(done / "out/evaluate_relu.json")["cross_entropy"]
        assert relu == pytest.approx(loss(), abs=1e-4)
        zeros: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.act_fn = Closed(threshold)
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: zeros.append(given[0] == 0))
        # As the logits of the forms agree (docs/prosparse.md); what the threshold changes is more than that.
        fatrelu = read(done / "out/evaluate_export.json")["cross_entropy"]
        assert fatrelu == pytest.approx(loss(), abs=1e-4) and abs(fatrelu - relu) > 2e-4
        sparsity = read(done / "out/sparsity/sparsity.json")
        assert sparsity["threshold"] == threshold and sparsity["fitted_threshold"] is None
        assert sparsity["sparsity"] == pytest.approx(float(torch.cat(zeros).double().mean()), abs=OF_ZEROS)
        assert sparsity["cross_entropy"] == pytest.approx(fatrelu, abs=1e-4)

    def test_a_second_run_has_nothing_to_do(self, done: Path, programs: Programs) -> None:
        """With the fitted threshold in later commands, not the assumed one."""
        words = ("-m", "spikingbrain_train", "pipeline", "run", "prosparse", *GIVEN, *TINY)
        run = programs.run(words, done)
        assert run.code == 0 and run.said.count(": done (") == 11, run.said


class Closed(torch.nn.Module):
    """FATReLU as the paper has it."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.where(gate >= self.threshold, gate, 0.0)
