"""The demo fits its stages to the machine, says what it chose, and keeps the choice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines import runner
from spikingbrain_train.pipelines.demo import command_line
from spikingbrain_train.pipelines.demo.budget import Lengths, Speed, check_minutes, fit
from spikingbrain_train.pipelines.demo.fit import fit_command_line, fit_stages
from spikingbrain_train.pipelines.demo.named_settings import NamedSettings
from spikingbrain_train.pipelines.demo.stages import beside_own, fitted_stages
from spikingbrain_train.pipelines.state import State
from spikingbrain_train.pipelines.steps import Step
from spikingbrain_train.planning.checks import check_optimizer
from tests.pipelines.demo.planned import planned

HELD_OUT = 11_329
# Measured by hand on two cores without bf16 instructions.
SLOW = Speed(
    precision="fp32",
    reason="because this CPU has no bf16 instructions",
    align=1 / 130,
    cpt=1 / 87,
    evaluation=1 / 260,
    start=12.0,
)
FAST = Speed("bf16", "because this CPU multiplies bf16 in hardware", 1 / 600, 1 / 400, 1 / 1500, 8.0)


@cache
def stage(name: str, *overrides: str) -> DictConfig:
    return compose_run([f"experiment=smollm2_{name}", *overrides])


def chosen(speed: Speed, minutes: float = 12, spent: float = 60) -> tuple[Lengths, DictConfig, DictConfig]:
    """The choice and the stages that it makes."""
    lengths = fit(speed, stage("align"), stage("cpt"), minutes, spent, HELD_OUT)
    return lengths, stage("align", *lengths.align_args), stage("cpt", *lengths.cpt_args)


def tokens(run: DictConfig) -> int:
    return run.stage.train_iters * run.stage.seq_length * run.stage.global_batch_size


def has_logits(run: DictConfig) -> bool:
    return run.stage.kind == "distill"


def minutes_of(speed: Speed, align: DictConfig, cpt: DictConfig, spent: float) -> float:
    """What the stages will take, in all."""
    teacher = speed.evaluation if has_logits(cpt) else 0.0
    windows = align.logging.eval_iters * align.stage.global_batch_size * align.stage.seq_length
    windows = min(windows, HELD_OUT)
    evaluations = 2 * (3 if speed.precision == "bf16" else 1)
    for run in (align, cpt):
        interval = run.logging.eval_interval or run.stage.train_iters
        evaluations += 1 + -(-run.stage.train_iters // interval)
    seconds = spent + 6 * speed.start + windows * evaluations * speed.evaluation
    seconds += (tokens(align) + align.stage.alignment.calibration_tokens / 2) * speed.align
    return (seconds + tokens(cpt) * (speed.cpt + teacher)) / 60


def slower(factor: float) -> Speed:
    times = {name: getattr(SLOW, name) * factor for name in ("align", "cpt", "evaluation")}
    return replace(SLOW, **times)


def test_a_fast_machine_gets_the_whole_recipe() -> None:
    lengths, align, cpt = chosen(FAST)
    assert (lengths.align_args, lengths.cpt_args) == ([], [])
    assert (tokens(align), tokens(cpt)) == (16_384, 81_920)
    assert "the whole recipe" in lengths.sentence and "multiplies bf16" in lengths.sentence


@pytest.mark.parametrize(("factor", "minutes"), [(0.4, 12), (0.7, 20), (1.0, 12), (1.5, 12)])
def test_a_slow_machine_ends_in_time_and_uses_it(factor: float, minutes: float) -> None:
    speed = slower(factor)
    _, align, cpt = chosen(speed, minutes)
    taken = minutes_of(speed, align, cpt, 60)
    whole = tokens(align) >= 16_000 and tokens(cpt) >= 81_000
    assert taken <= minutes and (taken >= 0.85 * minutes or whole)


def test_it_says_what_it_chose_and_why() -> None:
    lengths, align, cpt = chosen(SLOW)
    for said in (
        "aligns 130 and pretrains 87 tokens a second in fp32",
        "no bf16 instructions",
        "within 12 minutes",
        f"{tokens(align):,} and {tokens(cpt):,} tokens",
        "16,384 tokens of alignment and 81,920 of pretraining",
        f"{align.logging.eval_iters} windows",
    ):
        assert said in lengths.sentence


def test_stages_of_a_slow_machine_are_evaluated_on_the_same_windows_and_only_at_their_ends() -> None:
    _, align, cpt = chosen(SLOW)
    assert align.stage.seq_length == cpt.stage.seq_length
    assert align.logging.eval_iters == cpt.logging.eval_iters >= 4
    assert align.logging.eval_interval == cpt.logging.eval_interval == 0


def test_time_that_is_spent_is_not_spent_again() -> None:
    early, late = chosen(SLOW, spent=30), chosen(SLOW, spent=200)
    assert tokens(late[1]) < tokens(early[1]) and tokens(late[2]) < tokens(early[2])


def test_even_a_hopeless_budget_trains_a_little() -> None:
    _, align, cpt = chosen(slower(20), minutes=1, spent=600)
    assert align.stage.train_iters >= 8 and cpt.stage.train_iters >= 8
    with pytest.raises(ConfigurationError, match="budget is 0 minutes"):
        check_minutes(0)


OWN_BATCH = ("stage.seq_length=256", "stage.global_batch_size=4", "logging.eval_iters=4")


def chosen_beside(
    own: NamedSettings, speed: Speed = SLOW, minutes: float = 12
) -> tuple[Lengths, DictConfig, DictConfig]:
    """The choice where the user names settings, and the stages that both make."""
    lengths = fit(speed, stage("align", *own.align), stage("cpt", *own.cpt), minutes, 60, HELD_OUT, own)
    stages = [
        stage(name, *arguments, *beside_own(name, [f"experiment=smollm2_{name}", *arguments], own), *named)
        for name, arguments, named in (
            ("align", lengths.align_args, own.align),
            ("cpt", lengths.cpt_args, own.cpt),
        )
    ]
    for arguments, named in ((lengths.align_args, own.align), (lengths.cpt_args, own.cpt)):
        assert not {a.partition("=")[0] for a in arguments} & {a.partition("=")[0] for a in named}
    return lengths, *stages


def test_what_the_user_sets_is_kept() -> None:
    batch = ("stage.seq_length=256", "stage.global_batch_size=4")
    own = NamedSettings(batch, batch)
    _, align, cpt = chosen_beside(own, slower(2))
    assert minutes_of(slower(2), align, cpt, 60) <= 12
    assert align.stage.train_iters < stage("align", *own.align).stage.train_iters * 4


@pytest.mark.parametrize(
    "own",
    [
        NamedSettings(align=["stage.train_iters=50"]),
        NamedSettings(align=["stage.train_iters=1"]),
        NamedSettings(cpt=["stage.train_iters=20"]),
        NamedSettings(cpt=["stage.distillation.weight=0.3"]),
        NamedSettings(cpt=["stage.distillation.temperature=2"]),
        NamedSettings(cpt=["optimizer.lr=1e-5"]),
        NamedSettings(cpt=["optimizer.min_lr=1e-3", "optimizer.lr=1e-2"]),
        NamedSettings(align=["logging.eval_interval=10"], cpt=["logging.eval_interval=5"]),
        NamedSettings(align=["optimizer.lr_warmup_iters=30"]),
        NamedSettings(cpt=["optimizer=adamw_wsd", "optimizer.lr_wsd_decay_iters=20"]),
        NamedSettings(OWN_BATCH, OWN_BATCH),
    ],
    ids=lambda own: " ".join([*own.align, *own.cpt]),
)
def test_a_setting_named_for_one_stage_is_in_the_budget_and_the_sentence(
    own: NamedSettings,
) -> None:
    lengths, align, cpt = chosen_beside(own)
    assert minutes_of(SLOW, align, cpt, 60) <= 12
    for said in (
        "within 12 minutes",
        f"{tokens(align):,} and {tokens(cpt):,} tokens",
        f"{'with' if has_logits(cpt) else 'without'} the dense source's logits",
        f"sequences of {align.stage.seq_length}",
        f"{align.logging.eval_iters * align.stage.global_batch_size} windows",
    ):
        assert said in lengths.sentence
    for run in (align, cpt):
        # Neither sequence length nor windows differ, or the demo would refuse its own choice.
        assert (run.stage.seq_length, run.logging.eval_iters) == (
            align.stage.seq_length,
            align.logging.eval_iters,
        )
        check_optimizer(OmegaConf.to_object(run.optimizer), run.stage.train_iters)


def test_a_named_length_that_takes_longer_is_said() -> None:
    own = NamedSettings(align=["stage.train_iters=200"])
    lengths, align, cpt = chosen_beside(own)
    taken = minutes_of(SLOW, align, cpt, 60)
    assert taken > 12 and tokens(align) == 102_400
    said = re.search(
        r"about (\d+)m \d\ds are needed, not 12 minutes, as the stages take 102,400", lengths.sentence
    )
    assert said is not None and abs(int(said[1]) - taken) <= 2
    assert "within 12 minutes" not in lengths.sentence


def test_where_nothing_is_named_the_choice_is_the_recipe_for_few_tokens() -> None:
    shared = ["stage.seq_length=512", "stage.global_batch_size=1"]
    shared += ["logging.eval_iters=6", "logging.eval_interval=0"]
    lengths, _, _ = chosen(SLOW)
    assert lengths.align_args == ["stage.train_iters=16", *shared, "optimizer.lr_warmup_iters=2"]
    few = ["stage.kind=cpt", "stage.distillation.weight=null", "optimizer.lr=2e-4", "optimizer.min_lr=2e-5"]
    assert lengths.cpt_args == ["stage.train_iters=62", *shared, *few, "optimizer.lr_warmup_iters=5"]


def test_nothing_is_measured_where_both_lengths_are_named(tmp_path: Path) -> None:
    own = ["stage.train_iters=3"]
    steps = planned(tmp_path, align_args=own, cpt_args=own)
    assert "measure" not in steps and "fit" not in steps
    names = list(planned(tmp_path, align_args=own))
    assert names.index("hybrid") < names.index("measure") < names.index("fit") < names.index("evaluate_dense")


def test_measurement_does_not_depend_on_the_choice_that_follows_from_it(tmp_path: Path) -> None:
    chosen_lengths = fitted_stages(chosen(SLOW)[0], NamedSettings())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo_lengths.json").write_text(json.dumps(asdict(chosen_lengths)))
    first, second = planned(tmp_path), planned(tmp_path, is_done=lambda step: step.name == "fit")
    assert first["measure"].key == second["measure"].key
    assert first["evaluate_dense"].key != second["evaluate_dense"].key


def test_another_budget_that_changes_no_length_changes_no_stage(tmp_path: Path) -> None:
    first, second = planned(tmp_path, budget=40), planned(tmp_path, budget=60)
    assert first["fit"].key != second["fit"].key
    assert all(first[name].key == second[name].key for name in ("evaluate_dense", "align", "cpt", "export"))


class TestSecondCall:
    """tools/demo.py, with commands that only pretend to work."""

    @pytest.fixture
    def calls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the steps that ran."""
        ran: list[str] = []

        def pretend(step: Step, state: State, steps: Sequence[Step]) -> None:
            ran.append(step.name)
            state.records[step.name].seconds += 5.0
            for path in step.proof:
                assert path.is_relative_to(tmp_path), "a user's file would be replaced"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"tokens": HELD_OUT}))
            if step.name == "measure":
                step.proof[0].write_text(json.dumps(asdict(replace(SLOW, start=2.0 + len(ran)))))
            if step.name == "report":
                step.proof[0].write_text("the table")
            if step.train_iters is not None:
                tracker = step.makes[0] / "checkpoints" / "latest_checkpointed_iteration.txt"
                folder = tracker.parent / f"iter_{step.train_iters:07d}"
                folder.mkdir(parents=True)
                for name in ("model_config.yaml", ".metadata", "metadata.json", "common.pt"):
                    (folder / name).touch()
                tracker.write_text(str(step.train_iters))
            state.save(steps)
            if step.name == "fit":
                fit_command_line(step.command[3:])

        monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(runner, "_run", pretend)
        return ran

    def demo(self, tmp_path: Path, *arguments: str) -> None:
        command_line.demo(["--output", str(tmp_path / "out"), *arguments])

    def test_keeps_the_choice_and_does_nothing_again(
        self, tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.demo(tmp_path)
        assert calls.count("measure") == 1 and calls[-2:] == ["generate", "report"]
        first = capsys.readouterr().out
        done = len(calls)
        self.demo(tmp_path)
        assert len(calls) == done
        again = capsys.readouterr().out
        assert "within 12 minutes" in first and again.endswith("the table\n")

    def test_with_another_budget_does_again_what_depends_on_it(
        self, tmp_path: Path, calls: list[str]
    ) -> None:
        self.demo(tmp_path)
        del calls[:]
        self.demo(tmp_path, "--budget", "20")
        assert calls[:2] == ["fit", "evaluate_dense"] and "align" in calls and "measure" not in calls

    def test_fresh_measures_again(self, tmp_path: Path, calls: list[str]) -> None:
        self.demo(tmp_path)
        del calls[:]
        self.demo(tmp_path, "--fresh")
        assert "measure" in calls


def test_an_earlier_release_filled_the_folder_and_it_is_started_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "demo_state.json").write_text("{}")
    ran: list[str] = []
    monkeypatch.setattr(runner, "_run", lambda step, state, steps: ran.append(step.name))
    own = ["stage.train_iters=3", "optimizer.lr_warmup_iters=0"]
    (out / "demo_report.txt").write_text("old")
    with pytest.raises(SystemExit):  # the report is gone, and nobody wrote a new one
        command_line.demo(["--output", str(out), "--align-args", *own, "--cpt-args", *own])
    assert ran[0] == "source" and ran[-1] == "report"


def test_damaged_choice_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in ("{", "{}", "[]"):
        (tmp_path / "out" / "demo_lengths.json").write_text(content)
        with pytest.raises(ConfigurationError, match="demo_lengths.json cannot be read; remove it"):
            planned(tmp_path, is_done=lambda step: step.name == "fit")


def test_damaged_measurement_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps({"tokens": HELD_OUT}))
    (tmp_path / "speed.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"speed\.json"):
        fit_stages(tmp_path / "speed.json", tmp_path / "text", 12, 60, NamedSettings())
