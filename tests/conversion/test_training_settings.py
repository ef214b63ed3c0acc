"""Settings of training in the config.json of the own format: refused with a sentence that names them.

That they come back is held by tests/conversion/test_own_format.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.training_settings import (
    read_training_settings,
    training_settings,
)
from spikingbrain_train.errors import CheckpointError


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"moe.loss": 0.1}, r"moe\.loss = 0\.1 is no setting of training; there are .*moe\.z_loss_coeff"),
        ({"moe.num_experts": 3}, r"moe\.num_experts = 3 is no setting of training"),
        ({"moe.aux_loss_coeff": "much"}, r'moe\.aux_loss_coeff = "much" must be a number'),
        ({"moe.aux_loss_coeff": None}, r"moe\.aux_loss_coeff = null must be a number"),
        ({"moe.aux_loss_coeff": -1}, r"moe\.aux_loss_coeff=-1\.0 must be at least 0"),
        ({"moe.pad_to_capacity": 1}, r"moe\.pad_to_capacity = 1 must be true or false"),
        ({"moe.pad_to_capacity": True}, r"moe\.pad_to_capacity=true needs moe\.capacity_factor"),
    ],
)
def test_what_no_run_could_say_is_refused(values: dict[str, Any], sentence: str) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    with pytest.raises(CheckpointError, match=r"folder/config\.json: " + sentence):
        read_training_settings(ConfigKeys(values, Path("folder/config.json")), model)


def test_which_experts_a_run_trains_is_not_what_others_are_given() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    model.feed_forwards, model.moe.num_experts, model.moe.trained = ["moe"], 4, [1]
    written = training_settings(model)
    assert "moe.aux_loss_coeff" in written and "moe.trained" not in written
    back = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    read_training_settings(ConfigKeys(written, Path("folder/config.json")), back)
    assert back.moe.trained == []
