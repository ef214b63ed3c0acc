"""What stands beside a setting is held wherever the setting hangs, and cannot be forgotten."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import (
    FREE,
    SAID,
    START,
    WEIGHTS,
    Role,
    check_fields,
    decisions,
    leaves,
    refused,
    setting,
)
from spikingbrain_train.errors import ConfigurationError


@dataclass
class Inner:
    low: int = setting(1, minimum=1, resume=SAID)
    high: float | None = setting(2.0, above=0, maximum=9, resume=FREE)
    share: float = setting(0.0, minimum=0, below=1, must="be at least 0 and below 1, a share", resume=START)
    weights: list[float] = setting(default_factory=list, above=0, resume=refused("they would be others"))

    def check(self, prefix: str) -> None:
        """The bounds are in order."""
        high = self.high or math.inf
        require(self.low <= high, f"{prefix}low={self.low} must be below {prefix}high={high}")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str | None = setting(None, resume=WEIGHTS)
    layers: list[Any] = setting(default_factory=list, resume=WEIGHTS)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Inner(low=0), "inner.low=0 must be at least 1"),
        (Inner(high=0.0), "inner.high=0.0 must be greater than 0"),
        (Inner(high=9.5), "inner.high=9.5 must be at most 9"),
        (Inner(high=math.nan), "inner.high=nan must be a finite number"),
        (Inner(low=2**32), "inner.low=4294967296 is too large; it must be below 2**32 = 4294967296"),
        (Inner(share=1.0), "inner.share=1.0 must be at least 0 and below 1, a share"),
        (Inner(weights=[1.0, 0.0]), "inner.weights=0.0 must be greater than 0"),
        (Inner(low=3), "inner.low=3 must be below inner.high=2.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_rule_names_the_setting_where_it_hangs(config: Inner, sentence: str) -> None:
    for named, prefix in ((Outer(config), ""), (config, "inner.")):
        with pytest.raises(ConfigurationError) as refusal:
            check_fields(named, prefix)
        assert str(refusal.value) == sentence


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_texts_say_something_also_in_lists_of_lists(text: str) -> None:
    for config, name in ((Outer(name=text), "name"), (Outer(layers=[["gla", text]]), "layers")):
        with pytest.raises(ConfigurationError, match=f"^{name} must not be empty; give it a value"):
            check_fields(config)


def test_null_and_what_keeps_the_rules_pass() -> None:
    check_fields(Outer(Inner(low=9, high=None, weights=[0.5]), name="one", layers=["gla", ["gla", "swa"]]))


def test_every_setting_of_a_run_has_a_decision_and_those_of_the_model_a_role() -> None:
    run = RunConfig()
    assert list(decisions(run)) == list(leaves(run))
    for name, decision in decisions(run).items():
        assert (decision.role is not None) == name.startswith("model."), name
    assert decisions(Outer())["inner.share"].role is Role.start


def test_a_setting_without_a_decision_is_named() -> None:
    @dataclass
    class Forgetful:
        inner: Inner = field(default_factory=Inner)
        rate: float = 0.1

    with pytest.raises(TypeError, match="^part.rate does not say what resuming does with a change"):
        decisions(Forgetful(), "part.")
