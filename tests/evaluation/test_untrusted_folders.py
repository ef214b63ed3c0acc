"""A model's folder cannot make the tools fetch or run what the user gave no leave for."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel

from spikingbrain_train.data.quiet_transformers import quiet_transformers
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.folder_checks import keep_to_local_kernels
from spikingbrain_train.evaluation.pretrained import load_causal_lm, load_text_tokenizer
from tests.small_source import save_small_source


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def source(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "source"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels and addresses that were asked for."""
    asked: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(str(arguments))
        raise OSError("no network in tests")

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", refuse, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    cpu = torch.device("cpu")
    return load_causal_lm(folder, trust_remote_code=trust_remote_code, dtype=torch.float32, device=cpu)


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "owner/kernel"},
        {"_attn_implementation": "owner/kernel@main:attention"},
        {"attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "paged|owner/kernel"},
        {"_attn_implementation": {"": "owner/kernel"}},
        {"_experts_implementation": "owner/experts"},
        {"experts_implementation": "owner/experts"},
    ],
)
def test_kernels_that_a_config_names_are_not_loaded(
    source: Path, fetched: list[str], values: dict[str, Any], trust_remote_code: bool
) -> None:
    expected = load(source)
    change(source, **values)
    model = load(source, trust_remote_code=trust_remote_code)
    assert not fetched
    assert model.config._attn_implementation == "sdpa"
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_attention_of_torch_itself_is_kept(source: Path) -> None:
    change(source, _attn_implementation="eager")
    assert load(source).config._attn_implementation == "eager"


def test_kernels_of_a_part_of_a_config_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Multimodal models have a configuration for each part."""
    config = LlavaConfig(text_config=LlamaConfig(), vision_config=CLIPVisionConfig())
    config.text_config._attn_implementation = "owner/kernel"
    with caplog.at_level(logging.WARNING):
        keep_to_local_kernels(config)
    assert config.text_config._attn_implementation is None
    assert "'owner/kernel', which is not loaded" in caplog.text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            "has a quantization_config, .* use the unquantised",
        ),
        ({"text_config": {"quantization_config": {}}}, "has a quantization_config"),
        ({"text_config": {"quantization_config": {"quant_method": "bitnet"}}}, "has a quantization_config"),
        ({"compression_config": {"x": 1}}, "has a compression_config"),
        (
            {"auto_map": {"AutoConfig": "owner/repo--code.Config"}},
            r"auto_map names code of another repository",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, but the tensors are of 4 layers"),
    ],
)
def test_what_would_fetch_code_or_fill_the_machine_is_refused(
    source: Path, fetched: list[str], values: dict[str, Any], sentence: str
) -> None:
    change(source, **values)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=sentence):
        load(source, trust_remote_code=True)
    assert not fetched and time.monotonic() - started < 2.0


def test_an_adapter_is_neither_applied_nor_forgotten(source: Path) -> None:
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config\.json\)"):
        load(source)


def test_code_for_generation_does_not_run_without_leave(source: Path) -> None:
    (source / "custom_generate").mkdir()
    (source / "custom_generate/generate.py").write_text("raise SystemExit('it ran')\n")
    load(source)


def test_nothing_in_a_tokenizer_folder_is_fetched_or_run(source: Path, fetched: list[str]) -> None:
    change(source, auto_map={"AutoConfig": "owner/repo--code.Config"}, _name_or_path="owner/base")
    change(source, "tokenizer_config.json", name_or_path="owner/base", chat_template="{{ 1 / 0 }}")
    assert load_tokenizer(source).decode(load_tokenizer(source).encode("for")) == "for"
    assert load_text_tokenizer(source)("for")["input_ids"]
    assert not fetched


def test_the_network_is_out_of_reach_while_transformers_loads(fetched: list[str]) -> None:
    """Whatever key of a file a later version of transformers follows."""
    with quiet_transformers(), pytest.raises(Exception, match="offline|cannot find"):
        transformers.utils.hub.hf_hub_download("owner/base", "config.json")
    assert not fetched
