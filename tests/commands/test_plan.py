"""``spikingbrain-plan``: text for people, JSON for programs, without torch, code 0 whatever the verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from spikingbrain_train.commands.train import plan as run_plan

TOO_LARGE = ("experiment=spikingbrain_7b_8k", "parallel=single", "cluster=c550")


def plan(*arguments: str) -> str:
    code = (
        "import sys; sys.argv = ['spikingbrain-plan', *sys.argv[1:]]\n"
        "from spikingbrain_train.commands.programs import plan\n"
        "plan()\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_that_does_not_fit_is_no_error() -> None:
    assert "does not fit" in " ".join(plan(*TOO_LARGE).split())


@pytest.mark.parametrize("arguments", [("--json", *TOO_LARGE), (*TOO_LARGE, "--json", "dry_run_rank=0")])
def test_the_json_form_is_all_of_the_output(arguments: tuple[str, ...]) -> None:
    values = json.loads(plan(*arguments))
    assert values["memory"]["fit"] == "does not fit" and values["run"]["ranks"] == 1


@pytest.mark.parametrize("setting", ["callbacks", "logging.evaluators"])
def test_classes_that_are_not_there_are_refused(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["spikingbrain-plan", *TOO_LARGE, f"{setting}=[no.such.Class]"])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as end:
        run_plan()
    assert end.value.code == 2
    assert f"error: {setting} names no.such.Class, which cannot be imported" in capsys.readouterr().err
