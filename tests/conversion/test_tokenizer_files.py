"""An export splits text as its source does, and every tool finds its tokenizer."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion import tokenizer_files
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.pretrained import load_causal_lm, load_text_tokenizer
from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

TEXTS = [topics[key][:2000] for key in sorted(topics)[:20]]


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("tokenizer") / "source")


def name_class(folder: Path, class_name: str | None) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("tokenizer_class", None)
    path.write_text(json.dumps(values | ({"tokenizer_class": class_name} if class_name else {})))


def exported(source: Path, tmp_path: Path, format_name: str = "gla_swa") -> Path:
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig(sliding_window=7))
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "export", format_name=format_name)
    assert not [note for note in report.notes if "tokenizer" in note]
    return tmp_path / "export"


@pytest.mark.parametrize(
    "class_name",
    ["TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None],
)
def test_an_export_gives_the_ids_of_its_source(
    small_source: Path, tmp_path: Path, class_name: str | None
) -> None:
    """transformers reads a qwen2 folder as Qwen2Tokenizer, whatever generic class it names."""
    name_class(small_source, class_name)
    export = exported(small_source, tmp_path)
    theirs = AutoTokenizer.from_pretrained(small_source)(TEXTS)["input_ids"]
    for trust_remote_code in (False, True):
        ours = AutoTokenizer.from_pretrained(export, trust_remote_code=trust_remote_code)
        assert ours(TEXTS)["input_ids"] == theirs
    assert load_tokenizer(export).encode_batch(TEXTS) == theirs
    assert load_text_tokenizer(export)(TEXTS)["input_ids"] == theirs
    assert load_tokenizer(export).fingerprint == load_tokenizer(small_source).fingerprint
    # A class that both transformers 4 and 5 know.
    described = json.loads((export / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "Qwen2Tokenizer"


def test_a_generic_tokenizer_gives_no_token_types(small_source: Path, tmp_path: Path) -> None:
    """transformers 4 gives them if nobody says otherwise, and generate() refuses what no model reads."""
    source = Path(shutil.copytree(small_source, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}
    (source / "config.json").write_text(json.dumps(config | llama))
    weights = load_file(source / "model.safetensors")
    without = {name: tensor for name, tensor in weights.items() if not name.endswith("_proj.bias")}
    save_file(without, source / "model.safetensors", {"format": "pt"})
    name_class(source, "PreTrainedTokenizerFast")
    export = exported(source, tmp_path)
    described = json.loads((export / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert described["model_input_names"] == ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    texts = tokenizer(TEXTS[0][:40], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert (
        model.generate(**texts, max_new_tokens=1, pad_token_id=0).shape[1] == texts["input_ids"].shape[1] + 1
    )


def test_an_export_whose_tokenizer_would_differ_is_refused(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_class(small_source, "TokenizersBackend")
    monkeypatch.setattr(tokenizer_files, "name_tokenizer_class", lambda content, class_name: content)
    with pytest.raises(CheckpointError, match="gives other ids when it is loaded from an export"):
        exported(small_source, tmp_path)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("recipe", [None, ConversionConfig(sliding_window=7)], ids=["dense", "hybrid"])
def test_code_that_a_tokenizer_names_is_not_repeated(
    small_source: Path, tmp_path: Path, recipe: ConversionConfig | None
) -> None:
    source = Path(shutil.copytree(small_source, tmp_path / "source"))
    path = source / "tokenizer_config.json"
    elsewhere = {"AutoTokenizer": [None, "owner/repository--tokenization.Tokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": elsewhere}))
    import_checkpoint(source, tmp_path / "megatron", recipe)
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    assert "auto_map" not in (tmp_path / "export/tokenizer_config.json").read_text()
    assert [note for note in report.notes if "names code (auto_map), which is left out" in note]


def test_a_dense_export_of_a_hybrid_folder_never_gives_other_ids(small_source: Path, tmp_path: Path) -> None:
    """All layers of it attend to everything, so it can become qwen2, whose tokenizer class is another."""
    source = tmp_path / "source"
    config = GLAswaConfig(
        vocab_size=MODEL_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layers=[0, 1],
        sliding_window=None,
        initializer_range=0.2,
    )
    GLAswaForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_source / name, source)
    name_class(source, "PreTrainedTokenizerFast")
    theirs = load_tokenizer(source).encode_batch(TEXTS)
    import_checkpoint(source, tmp_path / "megatron")
    try:
        export_checkpoint(tmp_path / "megatron", tmp_path / "export", format_name="qwen2")
    except CheckpointError as error:  # transformers 5 reads a qwen2 folder as Qwen2Tokenizer
        assert "gives other ids when it is loaded from an export" in str(error)
    else:
        assert json.loads((tmp_path / "export/config.json").read_text())["model_type"] == "qwen2"
        assert load_tokenizer(tmp_path / "export").encode_batch(TEXTS) == theirs


@pytest.mark.parametrize("format_name", ["gla_swa", "spikingbrain"])
def test_loading_an_export_warns_of_nothing(
    small_source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    format_name: str,
) -> None:
    name_class(small_source, "PreTrainedTokenizerFast")
    export = exported(small_source, tmp_path, format_name)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="transformers"):
        warnings.simplefilter("error", FutureWarning)
        AutoTokenizer.from_pretrained(export, trust_remote_code=False)
        AutoTokenizer.from_pretrained(export, trust_remote_code=True)
        AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert [record.getMessage() for record in caplog.records] == []


def test_every_tool_works_on_an_export_with_llama3_rotary_scaling(small_source: Path, tmp_path: Path) -> None:
    """transformers cannot read its config.json as a plain configuration, and needs none for a tokenizer."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=MODEL_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters=scaling | {"rope_theta": 5e5, "original_max_position_embeddings": 64},
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    source = tmp_path / "source"
    LlamaForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((small_source / name).read_bytes())
    name_class(source, "PreTrainedTokenizerFast")
    export = exported(source, tmp_path)

    theirs = AutoTokenizer.from_pretrained(source)(TEXTS)["input_ids"]
    assert load_tokenizer(export).encode_batch(TEXTS) == theirs  # preprocess_data.py --tokenizer
    assert load_text_tokenizer(export)(TEXTS)["input_ids"] == theirs  # generate.py
    assert AutoTokenizer.from_pretrained(export, trust_remote_code=False)(TEXTS)["input_ids"] == theirs
    model = load_causal_lm(  # evaluate.py and generate.py
        export, trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu")
    )
    assert model.generate(torch.arange(1, 9)[None], max_new_tokens=3, pad_token_id=0).shape == (1, 11)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert again.config.rope_scaling["factor"] == 8.0
    assert "positions:  up to 128, rotary base 500000" in inspect_checkpoint(export).text(width=400)


def test_an_export_with_the_key_of_earlier_versions_has_a_tokenizer(
    small_source: Path, tmp_path: Path
) -> None:
    """rope_scaling in a gla_swa config.json, on which transformers fails outside the model's own code."""
    name_class(small_source, "Qwen2Tokenizer")
    export = exported(small_source, tmp_path)
    config = json.loads((export / "config.json").read_text())
    del config["spikingbrain_train"], config["rope_parameters"]
    config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    (export / "config.json").write_text(json.dumps(config))
    theirs = load_tokenizer(small_source).encode_batch(TEXTS)
    assert load_tokenizer(export).encode_batch(TEXTS) == theirs
    assert load_text_tokenizer(export)(TEXTS)["input_ids"] == theirs
