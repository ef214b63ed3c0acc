"""Mamba and Falcon-Mamba of transformers, there and back.

Bound of logits: 2e-4 in float32, of order 1-10; two correct implementations differ by the order of sums.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.mamba import FALCON_MAMBA, MAMBA
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.hf_models import HFCheckpoint, all_tensors, randomise
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.conversion.test_round_trip import assert_same_tensors
from tests.distributed.pool import RankPool

TOLERANCE = 2e-4
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "state_size": 5,
    "time_step_rank": 3,
}
FAMILIES: dict[str, tuple[type, type]] = {
    "Mamba": (MambaConfig, MambaForCausalLM),
    "Falcon-Mamba": (FalconMambaConfig, FalconMambaForCausalLM),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "untied, biases, wide kernels": {
        **{"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False},
        **{"conv_kernel": 6, "expand": 3},
    },
}


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of random weights, as transformers saves it."""
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**SIZES | changes))
    randomise(model)
    model.to(dtype).eval().save_pretrained(folder)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_computes_what_transformers_does_and_comes_back_bit_by_bit(
    ranks: RankPool, tmp_path: Path, family: str, options: str
) -> None:
    expected = logits(saved(tmp_path / "source", family, **OPTIONS[options]))
    assert expected.std() > 0.1  # logits that say nothing would agree, too
    import_checkpoint(tmp_path / "source", tmp_path / "megatron")
    for parallel in (
        ParallelConfig(),
        ParallelConfig(tensor_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2),
    ):
        found = ranks.run(
            megatron_logits,
            tmp_path / "megatron",
            world_size=parallel.model_parallel_size,
            parallel=parallel,
        )
        for of_rank in found:
            assert of_rank is None or (of_rank - expected).abs().max() <= TOLERANCE
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert report.architecture == FAMILIES[family][1].__name__
    assert_same_tensors(tmp_path / "back", tmp_path / "source")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "source/config.json").read_text()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_comes_back_bit_by_bit(tmp_path: Path, family: str) -> None:
    saved(tmp_path / "source", family, torch.bfloat16)
    import_checkpoint(tmp_path / "source", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "source")
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "back").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_written_anew_is_read_by_transformers_and_again(tmp_path: Path, family: str) -> None:
    """Where channels are no multiple of hidden_size, as in the published Falcon-Mamba, whose expand is 16."""
    saved(tmp_path / "source", family)
    hf_format = MAMBA if family == "Mamba" else FALCON_MAMBA
    config = json.loads((tmp_path / "source/config.json").read_text())
    model = hf_format.read(ConfigKeys(config, tmp_path))
    model = replace(model, mamba=replace(model.mamba, intermediate_size=40, time_step_rank=None))
    written = hf_format.config(model, None, "float32")
    again = hf_format.read(ConfigKeys(written, tmp_path))
    assert again.mamba == replace(model.mamba, time_step_rank=2)
    (tmp_path / "config.json").write_text(json.dumps(written))
    built = AutoModelForCausalLM.from_config(FAMILIES[family][0].from_pretrained(tmp_path))
    mixer = built.backbone.layers[0].mixer
    assert mixer.A_log.shape == (40, 5) and mixer.dt_proj.in_features == 2


def test_layers_and_sizes_are_read(tmp_path: Path) -> None:
    saved(tmp_path / "source", "Falcon-Mamba", mixer_rms_eps=1e-3, layer_norm_epsilon=1e-4)
    import_checkpoint(tmp_path / "source", tmp_path / "megatron")
    model = load_model_config(tmp_path / "megatron/iter_0000000/model_config.yaml")
    assert model.mixers == ["mamba"] and model.feed_forwards == ["no_mlp"]
    assert (model.mamba.bc_dt_norm, model.mamba.mixer_rms_eps, model.norm_epsilon) == (True, 1e-3, 1e-4)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (2, 2, 16)


def test_what_is_not_computed_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "source", "Mamba", hidden_act="relu")
    with pytest.raises(CheckpointError, match=r'hidden_act = "relu" is not supported'):
        import_checkpoint(tmp_path / "source", tmp_path / "megatron")


def test_each_class_holds_its_own_form_alone(tmp_path: Path) -> None:
    config = json.loads(FalconMambaConfig(**SIZES).to_json_string())
    model = FALCON_MAMBA.read(ConfigKeys(config, tmp_path))
    assert format_of_model(model) is FALCON_MAMBA
    assert MAMBA.unsupported(model) == ["Mamba layers with norms of B, C and dt"]
    plain = replace(model, mamba=replace(model.mamba, bc_dt_norm=False))
    assert format_of_model(plain) is MAMBA
    assert "layers without a feed-forward" not in MAMBA.unsupported(plain)
    assert MAMBA.unsupported(replace(plain, feed_forwards=["dense"]))


def test_feed_forwards_of_a_source_are_not_left_out(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    recipe = ConversionConfig(mixers=["gla"], feed_forwards=["no_mlp"])
    with pytest.raises(ConfigurationError, match="feed_forwards has no_mlp, which would leave out"):
        import_checkpoint(source, tmp_path / "megatron", recipe)
