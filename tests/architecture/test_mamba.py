"""What is known of Mamba layers without torch: their size, their starts, what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.mamba import initial_step_biases
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.mamba import MambaConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.errors import ConfigurationError

KIND = MIXERS["mamba"]
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=40,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=10,
    vocab_size=101,
    max_position_embeddings=64,
    mixers=["mamba"],
    feed_forwards=["no_mlp"],
    mamba=MambaConfig(bc_dt_norm=True),
    share_embeddings_and_output_weights=True,
)


def test_parameters_are_those_of_transformers() -> None:
    config = FalconMambaConfig(hidden_size=40, num_hidden_layers=3, vocab_size=101, tie_word_embeddings=True)
    expected = sum(parameter.numel() for parameter in FalconMambaForCausalLM(config).parameters())
    assert sum(weight.numel for _, weight in model_weights(MODEL)) == expected


def test_steps_begin_on_a_geometric_sequence() -> None:
    steps = [math.log1p(math.exp(bias)) for bias in initial_step_biases(5, 0.001, 0.1)]
    assert steps == pytest.approx([0.001, 10**-2.5, 0.01, 10**-1.5, 0.1])


def test_channels_that_ranks_cannot_share_are_refused() -> None:
    model = replace(MODEL, mamba=MambaConfig(intermediate_size=90))
    KIND.check_split(model, ParallelConfig(tensor_model_parallel_size=2))
    with pytest.raises(ConfigurationError, match=r"=4 does not divide model\.mamba\.intermediate_size=90"):
        KIND.check_split(model, ParallelConfig(tensor_model_parallel_size=4))


def test_steps_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"time_step_min=0\.2 is above model\.mamba\.time_step_max=0"
    ):
        check_fields(replace(MODEL, mamba=MambaConfig(time_step_min=0.2)), "model.")


def test_a_call_says_whether_states_are_handed_over() -> None:
    config = RunConfig(model=MODEL)
    one, first_of_two = SequenceLayout(64), SequenceLayout(64, 0, 0, 2)
    behind_sinks = SequenceLayout(64, 4)
    for layout, has_documents, passes in (
        (one, True, False),
        (behind_sinks, False, False),
        (behind_sinks, True, True),
        (replace(behind_sinks, sinks_are_padding=True), True, False),
        (first_of_two, False, True),
    ):
        assert KIND.op_call(config, MODEL, layout, has_documents).passes_states is passes
