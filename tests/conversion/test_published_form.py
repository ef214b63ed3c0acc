"""Exports compute the same in the published class, and published folders are read as they were trained.

Bound of every comparison of logits: 5e-6 on logits of order 1. Both sides compute in float64 with rotary
angles in float32, as every implementation has them, so that rounding does not blur what is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_conversion, load_model_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.report import ConversionReport
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.hf_models import SIZES, HFCheckpoint, all_tensors
from tests.conversion.megatron_models import TOKENS as MEGATRON_TOKENS
from tests.conversion.megatron_models import megatron_logits
from tests.conversion.published_class import PublishedModel, published_tensor_shapes
from tests.distributed.pool import RankPool

TOKENS = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(0))
TOLERANCE = 5e-6


def recipe(**changes: Any) -> ConversionConfig:
    """The SpikingBrain-7B pattern with a window far shorter than the text, and gates that differ."""
    config = ConversionConfig(**{"mixers": ["gla", "swa"], "sliding_window": 7, **changes})
    config.gla.init_gate_std = 1.0
    return config


def own_logits(folder: Path) -> torch.Tensor:
    """By the modelling code that the folder carries, which must find every tensor and want no other."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64, output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def notes_on_the_model(report: ConversionReport) -> list[str]:
    """Without that on the tokenizer: the sources here have an empty one."""
    return [note for note in report.notes if "tokenizer" not in note]


def imported(folder: Path) -> ModelConfig:
    model = load_model_config(folder / "iter_0000000/model_config.yaml")
    model.gla.init_gate_std = 0.0  # how the gate was drawn is not told by an export
    return model


@pytest.fixture
def published_folder(tmp_path: Path) -> Path:
    """A random checkpoint as the published code saves it, with sliding_window 16."""
    config = {name: value for name, value in SIZES.items() if not name.endswith("token_id")} | {
        "architectures": ["GLAswaForCausalLM"],
        "model_type": "gla_swa",
        "hidden_act": "swish",
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 16,
        "attn_layers": [1, 3],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if "norm" in name else 0.2 * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "tied", "window"),
    [("llama", True, 7), ("llama", False, 7), ("qwen2", True, 7), ("qwen2", False, 1)],
)
def test_an_export_computes_the_same_in_the_published_class(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, tied: bool, window: int
) -> None:
    """A Llama has no biases, and a tied model no output layer: the published class would draw them."""
    source, _ = hf_checkpoint(family, tie_word_embeddings=tied)
    import_checkpoint(source, tmp_path / "megatron", recipe(sliding_window=window))
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    published = PublishedModel(tmp_path / "export")
    assert (published.drawn, published.ignored) == ([], [])
    assert notes_on_the_model(report) == []
    logits = own_logits(tmp_path / "export")
    assert logits.std() > 0.1
    assert (published.logits(TOKENS) - logits).abs().max() <= TOLERANCE
    if window > 1:
        assert (published.logits(TOKENS, sdpa=True) - logits).abs().max() > 0.01


def test_a_bias_free_tied_source_survives_export_and_import(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    import_checkpoint(source, tmp_path / "megatron", recipe())
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    assert "zero biases for the published class" in report.table()
    assert "copy of the tied embedding" in report.table()
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "export").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")

    again = import_checkpoint(tmp_path / "export", tmp_path / "again")
    assert imported(tmp_path / "again") == imported(tmp_path / "megatron")
    assert not imported(tmp_path / "again").add_qkv_bias
    assert again.ignored == [
        "12 q/k/v biases (zero, for classes that always have them)",
        "lm_head.weight (identical to the tied embedding)",
    ]
    export_checkpoint(tmp_path / "again", tmp_path / "export_again")
    ours, theirs = all_tensors(tmp_path / "export_again"), all_tensors(tmp_path / "export")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "export_again/config.json").read_text()) == config


def test_saving_a_loaded_export_keeps_its_zero_biases(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    import_checkpoint(source, tmp_path / "megatron", recipe())
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert not [name for name, _ in model.named_parameters() if name.endswith("q_proj.bias")]
    model.save_pretrained(tmp_path / "saved")
    published = PublishedModel(tmp_path / "saved")
    assert published.drawn == []
    assert (published.logits(TOKENS) - own_logits(tmp_path / "saved")).abs().max() <= TOLERANCE


def test_biases_that_were_trained_in_the_published_class_are_not_dropped(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint("llama")
    import_checkpoint(source, tmp_path / "megatron", recipe())
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    tensors = all_tensors(tmp_path / "export")
    tensors["model.layers.2.attn.k_proj.bias"] += 0.5
    save_file(tensors, tmp_path / "export/model.safetensors", metadata={"format": "pt"})
    published = PublishedModel(tmp_path / "export").logits(TOKENS)
    assert (published - own_logits(tmp_path / "export")).abs().max() <= TOLERANCE
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.k_proj\.bias is not zero .*set it to true"):
        import_checkpoint(tmp_path / "export", tmp_path / "again")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3", {}, ["head_dim 16", "q/k norms"]),
        ("llama3_rope", {}, ["Llama 3's rotary scaling"]),
        (
            "llama",
            {"mixers": ["gla", "swa", "full"]},
            ["softmax attention in layers [1, 2]", "full attention in layers [2]"],
        ),
    ],
)
def test_what_the_published_class_does_not_compute_is_listed_and_loads_in_the_own_code(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, family: str, changes: dict, words: list[str]
) -> None:
    source, _ = hf_checkpoint(family)
    import_checkpoint(source, tmp_path / "megatron", recipe(**changes))
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    assert notes_on_the_model(report) == [
        f"the published modelling code has no {' and no '.join(words)}; load the folder with the code that "
        "it carries (trust_remote_code=True)"
    ]
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["spikingbrain_train"]["beyond_the_published_class"] == words
    assert own_logits(tmp_path / "export").isfinite().all()
    import_checkpoint(tmp_path / "export", tmp_path / "again")
    assert imported(tmp_path / "again") == imported(tmp_path / "megatron")


def test_a_gate_of_another_rank_is_listed(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    config = recipe()
    config.gla.gate_low_rank_dim, config.gla.gate_logit_normalizer = 8, 4.0
    import_checkpoint(source, tmp_path / "megatron", config)
    (note,) = notes_on_the_model(export_checkpoint(tmp_path / "megatron", tmp_path / "export"))
    assert "no a gate" not in note
    assert "gate of rank 8 and no gate normalizer of 4" in note


@pytest.mark.parametrize(
    ("convention", "window", "sdpa"),
    [(None, 17, False), (WindowConvention.published, 17, False), (WindowConvention.inclusive, 16, True)],
)
def test_a_published_folder_is_read_with_the_window_that_was_chosen(
    published_folder: Path, tmp_path: Path, convention: WindowConvention | None, window: int, sdpa: bool
) -> None:
    report = import_checkpoint(published_folder, tmp_path / "megatron", window_convention=convention)
    assert imported(tmp_path / "megatron").sliding_window == window
    (note,) = report.notes
    assert f"a token sees {window} tokens, itself included" in note
    assert "--window-convention published" in note and "--window-convention inclusive" in note
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    logits = own_logits(tmp_path / "export")
    trained = PublishedModel(published_folder)
    assert (trained.logits(TOKENS, sdpa=sdpa) - logits).abs().max() <= TOLERANCE
    assert (trained.logits(TOKENS, sdpa=not sdpa) - logits).abs().max() > 0.01
    # The export is for the published default, whatever was chosen.
    assert (PublishedModel(tmp_path / "export").logits(TOKENS) - logits).abs().max() <= TOLERANCE
    assert import_checkpoint(tmp_path / "export", tmp_path / "again").notes == []
    assert imported(tmp_path / "again") == imported(tmp_path / "megatron")


def test_an_export_of_an_earlier_version_keeps_its_window(published_folder: Path, tmp_path: Path) -> None:
    """Those had an inclusive sliding_window, and keys that no published folder has."""
    config = json.loads((published_folder / "config.json").read_text())
    config |= {"full_attention_layers": [], "qk_norm": False, "attention_bias": True, "rope_scaling": None}
    (published_folder / "config.json").write_text(json.dumps(config))
    assert import_checkpoint(published_folder, tmp_path / "megatron").notes == []
    assert imported(tmp_path / "megatron").sliding_window == 16


def test_a_convention_that_decides_nothing_is_refused(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("llama")
    with pytest.raises(ConfigurationError, match="--window-convention published has nothing to say about"):
        import_checkpoint(source, tmp_path / "megatron", window_convention=WindowConvention.published)


def test_a_published_folder_is_upcycled_to_experts(
    ranks: RankPool, published_folder: Path, tmp_path: Path
) -> None:
    """Its mixers and window stay, as the convention that is named reads it; the exact form of experts."""
    upcycling = load_conversion("upcycling", ["moe.num_experts=4", "moe.router_topk=2"])
    published = PublishedModel(published_folder)
    for convention in WindowConvention:
        output = tmp_path / f"read as {convention.value}"
        report = import_checkpoint(published_folder, output, upcycling, window_convention=convention)
        assert "4 moe (4 experts, top-2" in report.layers
        model = imported(output)
        window = 17 if convention is WindowConvention.published else 16
        assert (model.layer_mixers(), model.sliding_window) == ([("gla",), ("swa",)] * 2, window)
        (found,) = ranks.run(megatron_logits, output, world_size=1, parallel=ParallelConfig())
        expected = published.logits(MEGATRON_TOKENS, sdpa=convention is WindowConvention.inclusive)
        assert (found - expected).abs().max() <= 2e-4  # in float32
