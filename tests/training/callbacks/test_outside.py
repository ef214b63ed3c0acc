"""Callbacks and evaluators of other packages are named in a config, and checked at once."""

from __future__ import annotations

from typing import Any

import pytest

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.training.callbacks.outside import HOOKS, check_callbacks, outside_callbacks

OURS = "tests.training.callbacks.count_steps"


def config(*callbacks: Any, evaluators: Any = ()) -> RunConfig:
    run = RunConfig(output_dir="unused", callbacks=list(callbacks))
    run.logging.evaluators = list(evaluators)
    return run


def test_a_class_is_named_with_or_without_settings() -> None:
    for entry in (f"{OURS}.CountSteps", {"path": f"{OURS}.CountSteps"}):
        (callback,) = outside_callbacks(config(entry))
        assert callback.state_dict()["steps"] == 0
    (callback,) = outside_callbacks(config({"path": f"{OURS}.CountSteps", "settings": {"first": 7}}))
    assert callback.state_dict()["steps"] == 7


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nowhere.at.All", ["callbacks names nowhere.at.All", "No module named 'nowhere'", "PYTHONPATH"]),
        (f"{OURS}.Nobody", [f"{OURS} has no Nobody"]),
        ("CountSteps", ["CountSteps names no module", "package.module.Class"]),
        (f"{OURS}.NoCallback", ["no subclass of spikingbrain_train.training.callbacks.callback.Callback"]),
        ("os.path.join", ["os.path.join, which is no subclass of"]),
        (f"{OURS}.Misspelt", ["method step_ends is no hook", "did you mean step_end?"]),
        (f"{OURS}.OtherArguments", ["before_update does not take (self, grad_norm)"]),
        ({"path": f"{OURS}.CountSteps", "settings": {"last": 1}}, ["settings", "argument 'last'"]),
    ],
    ids=str,
)
def test_what_is_no_callback_is_refused_with_a_sentence(entry: Any, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_callbacks(config(entry))
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("setting", ["callbacks", "logging.evaluators"])
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([7], "[0]=7 does not fit"),
        ([["a.B"]], "takes package.module.Class, or {path: package.module.Class, settings"),
        ([{"settings": {}}], "[0]={'settings': {}} does not fit"),
        ([{"path": "a.B", "more": 1}], "does not fit"),
        ([{"path": "a.B", "settings": 3}], "does not fit"),
        (["a.B", {"path": "a.B"}], "names a.B more than once"),
    ],
    ids=str,
)
def test_what_names_no_class_is_refused_without_an_import(setting: str, entries: list, words: str) -> None:
    wrong = config(*entries) if setting == "callbacks" else config(evaluators=entries)
    with pytest.raises(ConfigurationError) as refusal:
        wrong.check("")
        wrong.logging.check("logging.")
    assert setting in str(refusal.value) and words in str(refusal.value)


def test_every_hook_of_the_example_is_called() -> None:
    from tests.training.callbacks.count_steps import CountSteps

    untested = {
        "signal",  # tests/distributed/test_stop_signals.py
        "update_skipped",  # tests/distributed/test_bad_batches.py
        "alert",  # tests/distributed/test_watching.py
    }
    assert set(HOOKS) - set(vars(CountSteps)) == untested
