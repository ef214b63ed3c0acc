"""BitNetForCausalLM of transformers, both ways, with its online quantisation and without.

Bound of logits: 2e-4 on float32 logits of order 1-10, as in test_logits.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.registry import format_of_config, parse_hf_config
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.hf_models import SIZES, all_tensors, randomise
from tests.conversion.megatron_models import TOKENS, megatron_logits
from tests.distributed.pool import RankPool

bitnet: Any = pytest.importorskip("transformers.models.bitnet")

TOLERANCE = 2e-4
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles how it rounds; as it is written it needs no compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def source(folder: Path, quantization: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A small random checkpoint as transformers saves it; ``quantization`` is written beside its floats."""
    model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig(**{**SIZES, **changes})).eval()
    randomise(model)
    model.bfloat16().save_pretrained(folder)
    if quantization is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder


def logits_by_transformers(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "BitNetForCausalLM"
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("quantization", "changes"),
    [(None, {}), (ONLINE, {"attention_bias": True, "tie_word_embeddings": True})],
    ids=["floats", "online"],
)
def test_logits_are_those_of_transformers_and_the_folder_comes_back_bit_for_bit(
    quantization: Any, changes: dict[str, Any], ranks: RankPool, tmp_path: Path
) -> None:
    folder = source(tmp_path / "source", quantization, **changes)
    expected = logits_by_transformers(folder)
    import_checkpoint(folder, tmp_path / "megatron")
    model = load_model_config(tmp_path / "megatron/iter_0000000/model_config.yaml")
    assert model.attn_sub_norm and model.ffn_sub_norm and model.activation_func is ActivationFunc.relu2
    assert (
        bool(model.ternary.projections) == bool(model.int8_inputs.projections) == (quantization is not None)
    )
    arguments = (megatron_logits, tmp_path / "megatron")
    (found,) = ranks.run(*arguments, world_size=1, parallel=ParallelConfig())
    assert expected.std() > 0.1 and (found - expected).abs().max() <= TOLERANCE
    if quantization is not None:
        plain = source(tmp_path / "plain", None, **changes)
        assert (logits_by_transformers(plain) - expected).abs().max() > 0.1  # rounding shows

    export_checkpoint(tmp_path / "megatron", tmp_path / "again")
    was, now = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert now == was
    ours, theirs = all_tensors(tmp_path / "again"), all_tensors(folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits_by_transformers(tmp_path / "again"), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"quantization_config": ONLINE | {"linear_class": "bitlinear"}},
            "import the unquantised checkpoint",
        ),
        ({"quantization_config": ONLINE | {"use_rms_norm": True}}, "without use_rms_norm"),
        (
            {"quantization_config": ONLINE | {"modules_to_not_convert": []}},
            "modules_to_not_convert null or lm_",
        ),
        ({"head_dim": 16}, "the width of attn_sub_norm"),
        ({"mlp_bias": True}, "not read by BitNetForCausalLM"),
    ],
)
def test_what_is_not_read_is_refused(changes: dict[str, Any], words: str) -> None:
    values = {**SIZES, "architectures": ["BitNetForCausalLM"], "model_type": "bitnet"} | changes
    with pytest.raises(CheckpointError, match=words):
        parse_hf_config(values, Path("config.json"))


def test_what_its_class_has_by_default_is_read_where_config_json_is_silent() -> None:
    values = {**SIZES, "architectures": ["BitNetForCausalLM"], "model_type": "bitnet"}
    hf_format = format_of_config(values, Path("config.json"))
    model, theirs = hf_format.read(ConfigKeys(values, Path("config.json"))), bitnet.BitNetConfig(**SIZES)
    assert (model.norm_epsilon, model.rotary_base) == (theirs.rms_norm_eps, 500000.0)
    assert model.activation_func.value == theirs.hidden_act


def test_no_experts_are_made_of_feed_forwards_with_norms(tmp_path: Path) -> None:
    recipe = ConversionConfig(mixers=["full"], feed_forwards=["moe"])
    with pytest.raises(ConfigurationError, match=r"ffn_sub_norm=true: experts have no norms"):
        import_checkpoint(source(tmp_path / "source"), tmp_path / "megatron", recipe)
