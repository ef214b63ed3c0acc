"""Texts that a step has routed to adapters, read by the steps behind it: evaluated and answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.pipelines.pipeline_file import load_pipeline
from spikingbrain_train.pipelines.plan import plan_pipeline
from tests.bricks.test_adapters import adapter_of
from tests.distributed.test_routed_generation import PROMPTS, SAMPLES, chosen, losses_of_peft
from tests.pipelines.planned import steps_of
from tests.programs import Programs
from tests.small_source import save_small_source

ADAPTERS = [f"{name}=adapters/{name}" for name in SAMPLES]
READ = {"model": "base", "adapters": ADAPTERS, "device": "cpu", "dtype": "float32"}
ROUTE = ["spikingbrain-bricks", "route", "--model", "base", "--device", "cpu", "--dtype", "float32"]
ROUTE += ["--bricks", *(f"{name}={name}.txt" for name in SAMPLES), "--seq-length", "24"]
ROUTE += ["--prompt", *PROMPTS, "--output", "choices.json"]
STEPS = {
    # Behind what reads its choices: steps run in the order of their references.
    "measure": {"kind": "evaluate", **READ, "routed": "${steps.route.choices}"},
    "answer": {"kind": "generate", **READ, "routed": "${steps.route.choices}", "max_new_tokens": 2},
    "route": {
        **{"kind": "command", "command": ROUTE, "outputs": {"choices": "choices.json"}},
        "reads": ["base", *(f"{name}.txt" for name in SAMPLES)],
    },
}
GIVEN_FILE = ("steps.measure.routed=given.json", "steps.answer.routed=given.json")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pipeline, and stand-ins for what it reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routed.yaml").write_text(json.dumps({"output": "out", "steps": STEPS}))  # JSON is YAML
    for folder in ("base", *(f"adapters/{name}" for name in SAMPLES)):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "base/config.json").write_text("{}")
    for name, text in SAMPLES.items():
        (tmp_path / f"adapters/{name}/adapter_config.json").write_text("{}")
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def test_what_reads_choices_comes_behind_the_step_that_makes_them(workplace: Path) -> None:
    file = load_pipeline("routed.yaml")
    steps = {step.name: step for step in plan_pipeline(file, lambda _: False).steps}
    assert list(steps)[0] == "route"
    for name in ("measure", "answer"):
        command = steps[name].command
        assert command[command.index("--routed") + 1] == "choices.json"
        assert steps[name].needs == {"route": steps["route"].key}
    # Other prompts choose anew, and with them all that was measured is stale.
    again = steps_of(
        "routed.yaml", "steps.route.command=[spikingbrain-bricks, route, --output, choices.json]"
    )
    assert all(again[name].key != steps[name].key for name in steps)


def test_another_choice_or_adapter_makes_the_results_stale(workplace: Path) -> None:
    (workplace / "given.json").write_text(json.dumps({"prompts": [{"prompt": "a", "chosen": "numbers"}]}))
    names = ("measure", "answer")
    keys = [[steps_of("routed.yaml", *GIVEN_FILE)[name].key for name in names]]
    (workplace / "given.json").write_text(json.dumps({"prompts": [{"prompt": "bc", "chosen": "letters"}]}))
    keys.append([steps_of("routed.yaml", *GIVEN_FILE)[name].key for name in names])
    (workplace / "adapters/letters/adapter_model.safetensors").write_text("other weights")
    keys.append([steps_of("routed.yaml", *GIVEN_FILE)[name].key for name in names])
    assert all(len(set(of_step)) == 3 for of_step in zip(*keys, strict=True))


@pytest.mark.parametrize(
    ("arguments", "content", "sentence"),
    [
        (GIVEN_FILE, None, "given.json does not exist; correct it"),
        (GIVEN_FILE, "{}", "step measure: --routed given.json is no result of spikingbrain-bricks route"),
        (GIVEN_FILE, '{"prompts": []}', "step measure: --routed given.json has no prompts"),
        (("steps.measure.routed=null",), None, "step measure: --adapters is read with --routed only"),
        (
            ("steps.answer.adapters=[numbers=nowhere]",),
            None,
            "step answer (adapters[0]): nowhere does not exist",
        ),
    ],
)
def test_choices_that_cannot_be_read_are_refused_before_anything_runs(
    workplace: Path, arguments: tuple[str, ...], content: str | None, sentence: str
) -> None:
    if content is not None:
        (workplace / "given.json").write_text(content)
    with pytest.raises(SpikingBrainError) as refusal:
        plan_pipeline(load_pipeline("routed.yaml", arguments), lambda _: False)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline_measures_what_its_own_step_has_routed(workplace: Path, programs: Programs) -> None:
    """Nats a token are peft's own, within 1e-5 relative, in float32; so are the texts' adapters."""
    save_small_source(workplace / "base")
    for rank, name in enumerate(SAMPLES, start=2):
        adapter_of(workplace / "base", workplace / "adapters" / name, rank)
    run = programs.run(("-m", "spikingbrain_train", "pipeline", "run", "routed.yaml"), workplace)
    assert run.code == 0 and "all 3 steps are done" in run.said, run.said[-3000:]

    names = chosen(workplace)
    assert names[:2] == ["numbers", "letters"]
    measured = json.loads((workplace / "out/measure.json").read_text())["routed"]
    nats = losses_of_peft(workplace)
    with_chosen = sum(nats[name][index] for index, name in enumerate(names))
    assert measured["cross_entropy"] == pytest.approx(with_chosen / measured["tokens"], rel=1e-5)
    without = sum(nats[None]) / measured["tokens"]
    assert measured["cross_entropy_without_adapters"] == pytest.approx(without, rel=1e-5)
    assert without != pytest.approx(measured["cross_entropy"], rel=1e-3)
    answers = json.loads((workplace / "out/answer.json").read_text())
    assert [each["chosen"] for each in answers] == names
