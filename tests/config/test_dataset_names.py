"""Datasets have short names of their own."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.dataset_names import dataset_names


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        ([], []),
        (["data/text_valid"], ["text_valid"]),
        (["/a/wiki", "/a/code"], ["wiki", "code"]),
        (["data/wiki/valid", "data/code/valid", "x/books"], ["wiki/valid", "code/valid", "books"]),
        (["/a/x/valid", "/b/x/valid"], ["a/x/valid", "b/x/valid"]),
        (["valid", "a/valid"], ["valid", "a/valid"]),
        (["/valid", "a/valid"], ["valid", "a/valid"]),
        (["a/valid", "a/valid", "valid_2"], ["valid", "valid_2", "valid_2_2"]),
    ],
)
def test_names_are_short_and_differ(prefixes: list[str], names: list[str]) -> None:
    assert dataset_names(prefixes) == names
