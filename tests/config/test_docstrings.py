"""Words beside settings are read from their source, and every setting has some."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pytest

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.docstrings import (
    docstring_of,
    field_docstrings,
    member_docstrings,
    summary,
)
from spikingbrain_train.config.manual import sections_of
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import FREE, setting


class Colour(Enum):
    """What it looks like."""

    red = "red"
    """As blood.

    And as roses.
    """
    green = "green"


@dataclass
class Base:
    weight: float = setting(1.0, above=0, maximum=9, resume=FREE)
    """In kilograms,
    without the box."""
    silent: int = 0


@dataclass
class Thing(Base):
    """A thing."""

    colour: Colour = Colour.red
    """Of the outside, e.g. for children. Not of the inside."""


def test_fields_and_members_are_read_from_the_source():
    assert field_docstrings(Thing) == {
        "weight": "In kilograms, without the box.",
        "colour": "Of the outside, e.g. for children. Not of the inside.",
    }
    assert member_docstrings(Colour) == {"red": "As blood.\n\nAnd as roses.", "green": ""}
    assert (docstring_of(Thing), docstring_of(Base)) == ("A thing.", "")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Of the outside, e.g. for children. Not of the inside.", "Of the outside, e.g. for children"),
        ("Weight of k (eq. 6). More.", "Weight of k (eq. 6)"),
        ("Llama 3.1 and later. More.", "Llama 3.1 and later"),
        ("One.\n\nTwo.", "One"),
        ("No full stop", "No full stop"),
    ],
)
def test_a_summary_is_the_first_sentence(text, first):
    assert summary(text) == first


def test_a_setting_is_described_with_its_bounds_and_choices():
    (section,) = sections_of(Thing, "thing")
    entries = {entry.name: entry for entry in section.settings}
    assert entries["thing.weight"].takes == "a number, greater than 0, at most 9"
    assert entries["thing.weight"].default == "1"
    assert entries["thing.weight"].on_resume == "takes effect"
    assert entries["thing.silent"].on_resume is None
    assert entries["thing.colour"].choices == {"red": "As blood.\n\nAnd as roses.", "green": ""}


@pytest.mark.parametrize("schema", [RunConfig, ConversionConfig])
def test_every_setting_and_section_has_words(schema):
    for section in sections_of(schema):
        assert section.text
        for entry in section.settings:
            assert len(summary(entry.text)) > 10, f"{entry.name} says nothing of itself"
            if any(entry.choices.values()):
                assert all(entry.choices.values()), f"a choice of {entry.name} says nothing of itself"
