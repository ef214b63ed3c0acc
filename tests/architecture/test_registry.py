"""What a module from outside registers is held to what a kind has to be, before anything uses it."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any

import pytest

from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.registry import Registry
from spikingbrain_train.config import sections
from spikingbrain_train.config.import_path import object_of_kind
from spikingbrain_train.config.plugins import plugins_of
from spikingbrain_train.config.setting import FUNCTION, setting
from spikingbrain_train.errors import ConfigurationError


class Kind(MixerKind):
    """One whose methods nobody calls."""

    name = "mine"

    def weights(self, model: Any, group: str = "attention") -> tuple[()]:
        return ()

    def core_flops(self, model: Any, seq_length: int) -> float:
        return 0.0

    def activation_bytes(self, config: Any) -> float:
        return 0.0


def of_module(module: str) -> MixerKind:
    return type("Kind", (Kind,), {"__module__": module, "__qualname__": "Kind"})()  # type: ignore[abstract]


def test_a_name_that_is_taken_is_refused_whatever_the_class_is_called() -> None:
    kinds: Registry[MixerKind] = Registry("mixer", "model.mixers")
    first = kinds.register(of_module("theirs"))
    assert kinds.register(of_module("theirs")) is first  # imported again
    with pytest.raises(ConfigurationError, match="mixer mine is registered twice, by theirs and ours; give"):
        kinds.register(of_module("ours"))
    assert kinds["mine"] is first


@dataclass
class Settings:
    width: int = setting(1, minimum=1, resume=FUNCTION)


@dataclass
class WithoutDefault:
    width: int


@dataclass
class WithoutDecision:
    width: int = 1


class NoDataclass:
    width = 1


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("moe", Settings, "calls its settings moe, as a model's are called already"),
        ("num_layers", Settings, "calls its settings num_layers, as a model's are called already"),
        ("my-mixer", Settings, "calls its settings 'my-mixer', which is no Python identifier"),
        ("mine", NoDataclass, "NoDataclass, which is no dataclass"),
        ("mine", WithoutDefault, r"WithoutDefault, whose fields need setting\(default, resume=...\) each"),
        ("mine", WithoutDecision, r"WithoutDecision, whose fields need .* each: mine\.width does not say"),
    ],
)
def test_a_section_is_a_dataclass_that_says_all_about_its_settings(
    name: str, settings: type, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        sections.add_section(name, settings)
    assert name not in sections._sections


def test_two_plugins_cannot_have_one_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sections._sections, "mine", Settings)
    sections.add_section("mine", Settings)
    other = make_dataclass("Others", [("width", int, setting(1, resume=FUNCTION))])
    with pytest.raises(ConfigurationError, match="calls its settings mine, as a model's are called already"):
        sections.add_section("mine", other)


@pytest.mark.parametrize("path", ["no_such_package.modules:spec", "spikingbrain_train.errors:spec"])
def test_the_module_of_a_kind_that_is_not_there_is_one_sentence(path: str) -> None:
    with pytest.raises(ConfigurationError, match=f"mixer mine is made by {path}, which cannot be imported: "):
        object_of_kind(path, "mixer mine")


@pytest.mark.parametrize("named", ["name", 3, {"a": 1}, [3], [None], [""], [["a"]]])
def test_plugins_are_a_list_of_names(named: Any) -> None:
    with pytest.raises(ConfigurationError, match="the command line has plugins=.*; it takes a list"):
        plugins_of({"plugins": named}, "the command line")
