"""The layers of a model in a line, with a legend."""

from __future__ import annotations

import pytest

from spikingbrain_train.architecture.layer_letters import layer_letters
from tests.config.small_model import small_model


@pytest.mark.parametrize(
    ("mixers", "feed_forwards", "line", "legend"),
    [
        (["gla", "swa"], ["dense"], "G S G S", {"G": "gla", "S": "swa"}),
        (["full", "gla", "gla"], ["dense"], "F G G F", {"F": "full", "G": "gla"}),
        (
            [["gla", "swa"], ["gla", "full"]],
            ["dense", "moe"],
            "GS GF* GS GF*",
            {"S": "swa", "G": "gla", "F": "full", "*": "moe"},
        ),
    ],
)
def test_every_layer_is_a_word(mixers, feed_forwards, line, legend):
    words, meaning = layer_letters(small_model(num_layers=4, mixers=mixers, feed_forwards=feed_forwards))
    assert " ".join(words) == line and meaning == legend
