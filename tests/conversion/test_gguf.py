"""GGUF files: transformers, the package gguf and llama.cpp find the Megatron model in them.

Bounds. Floats: logits 2e-4 in float32, as in test_own_format.py. Ternary matrices: codes exactly, scales to
half a unit of float16's eleventh bit (2^-11), or exactly beside the blocks. llama.cpp rounds inputs of
ternary products to INT8 with a scale for 32 or 256 of them, where a model has one a token unless it was
trained for llama.cpp: see the tests of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    Q8InputsConfig,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.load import load_model_config, save_config
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.gguf import Q2_0, Q4_0, TQ2_0, BlockType
from spikingbrain_train.conversion.formats.registry import format_of_model
from spikingbrain_train.conversion.gguf_blocks import ternary_blocks
from spikingbrain_train.conversion.gguf_tokenizer import pre_tokenizer_name
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.hf.modeling_spikingbrain import SpikingBrainForCausalLM
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_codes, ternary_scales
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE
from tests.conversion.test_own_format import NEW_TOKENS, TEXT, TOLERANCE, save_and_compute
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool
from tests.small_source import save_small_source

gguf: Any = pytest.importorskip("gguf")

LINEARS = [each for each in Projection if each is not Projection.gate]
QWEN2 = replace(CASES["full attention"].model, max_position_embeddings=128)
LLAMA = replace(QWEN2, add_qkv_bias=False)
MODELS = {
    "Llama": LLAMA,
    "Llama, tied, heads of another width": replace(
        LLAMA, share_embeddings_and_output_weights=True, kv_channels=16
    ),
    "Qwen2": QWEN2,
    "Qwen3": replace(LLAMA, qk_layernorm=True, kv_channels=128),  # transformers reads no other width of it
}
SUB_NORMS = replace(LLAMA, share_embeddings_and_output_weights=True, attn_sub_norm=True, ffn_sub_norm=True)
TERNARY = replace(
    LLAMA,
    hidden_size=64,
    ffn_hidden_size=256,
    num_layers=2,
    ternary=TernaryConfig(LINEARS),
    int8_inputs=Int8InputsConfig(LINEARS),
)


def saved(ranks: RankPool, model: ModelConfig, folder: Path) -> Any:
    (expected,) = ranks.run(save_and_compute, model, model, folder, world_size=1, parallel=ParallelConfig())
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model_from_a_file_of_floats(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    expected = saved(ranks, MODELS[name], tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", format_name="gguf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        logits = loaded.eval()(TEXT).logits
    assert logits.std() > 0.1 and (logits - expected.logits).abs().max() <= TOLERANCE
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        import_checkpoint(tmp_path / "out", tmp_path / "again")


def test_ternary_matrices_are_held_with_their_codes(ranks: RankPool, tmp_path: Path) -> None:
    saved(ranks, TERNARY, tmp_path / "megatron")
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "out", format_name="gguf")
    export_checkpoint(tmp_path / "megatron", tmp_path / "floats", format_name="gguf", float_weights=True)
    files = [gguf.GGUFReader(tmp_path / name / "model.gguf") for name in ("out", "floats")]
    ternary, floats = ({tensor.name: tensor for tensor in file.tensors} for file in files)
    assert ternary.keys() == floats.keys()
    kinds = {"ffn_down": "TQ2_0", "attn_norm": "F32", "ffn_norm": "F32"}
    for name, tensor in ternary.items():
        if not name.startswith("blk."):
            continue
        kind = kinds.get(name.split(".")[2], "Q4_0")
        assert tensor.tensor_type.name == kind
        if kind == "F32":
            continue
        weight = torch.tensor(floats[name].data)
        scale = ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        codes = ternary_codes(weight, scale)
        assert codes.unique().tolist() == [-1, 0, 1]
        assert torch.equal(found, codes * scale.half().float())
        assert abs(float(scale.half() / scale) - 1) <= 2**-11
    notes = " ".join(report.notes)
    assert "ffn_down: ternary numbers as TQ2_0, 2.0625 bits a weight" in notes
    assert "attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up: ternary numbers as Q4_0, 4.5 bits" in notes


@pytest.mark.parametrize(("format_name", "share"), [("gguf", 0.25), ("gguf_q2_0", 0.14)])
def test_smollm2s_projections_take_at_most_a_quarter_of_bfloat16(format_name: str, share: float) -> None:
    sizes = {"num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_query_groups": 3, "kv_channels": 64}
    model = replace(LLAMA, ternary=TernaryConfig(LINEARS), **sizes, **heads)
    hf_format: Any = format_of_model(model, format_name)
    kinds = [(weight.numel, hf_format.block_type(weight, model)) for _, weight in model_weights(model)]
    ternary = [(numel, kind) for numel, kind in kinds if kind is not None]
    assert sum(numel for numel, _ in ternary) == 30 * 3_538_944
    assert sum(numel * kind.bits for numel, kind in ternary) <= share * 16 * 30 * 3_538_944


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_scales_stand_beside_matrices_whose_llama_cpp_reads_them(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    # All as TQ2_0: the package reads no Q2_0.
    sizes = {"hidden_size": 256, "ffn_hidden_size": 256, "kv_channels": 128}
    model = replace(MODELS[name], ternary=TernaryConfig(LINEARS), **sizes)
    saved(ranks, model, tmp_path / "megatron")
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "out", format_name="gguf_q2_0")
    export_checkpoint(tmp_path / "megatron", tmp_path / "floats", format_name="gguf", float_weights=True)
    files = [gguf.GGUFReader(tmp_path / folder / "model.gguf") for folder in ("out", "floats")]
    found, floats = ({each.name: torch.tensor(each.data) for each in file.tensors} for file in files)
    rounded = 0
    for tensor, data in floats.items():
        if data.ndim != 2 or not tensor.startswith("blk."):
            continue
        scale = ternary_scales(magnitude_sum(data), data.numel(), data.dtype)
        beside = found.pop(tensor.replace(".weight", ".scale"), None)
        held = found[tensor].unflatten(-1, (-1, 66))[..., 64:].contiguous().view(torch.float16)
        if name == "Qwen2" and "ffn" in tensor:
            assert beside is None and (held == scale.half()).all()
            rounded += 1
        else:
            assert torch.equal(beside, scale.reshape(1)) and (held == 1).all()
    assert found.keys() == floats.keys()
    assert rounded == (3 * model.num_layers if name == "Qwen2" else 0)
    assert any("rounded to float16" in note for note in report.notes) == (name == "Qwen2")


def _q2_0(blocks: Tensor) -> Tensor:
    """dequantize_row_q2_0 of ggml/src/ggml-quants.c, number by number; the package has no such type."""
    rows = []
    for row in blocks.tolist():
        values = []
        for first in range(0, len(row), 18):
            block = row[first : first + 18]
            scale = torch.tensor(block[:2], dtype=torch.uint8).view(torch.float16).item()
            values += [((block[2 + j // 4] >> (j % 4) * 2) & 3) * scale - scale for j in range(64)]
        rows.append(values)
    return torch.tensor(rows)


def _by_package(name: str) -> Callable[[Tensor], Tensor]:
    kind = gguf.GGMLQuantizationType[name]
    return lambda blocks: torch.tensor(gguf.dequantize(blocks.numpy(), kind))


@pytest.mark.parametrize("kind", [TQ2_0, Q2_0, Q4_0], ids=lambda kind: kind.name)
def test_blocks_hold_what_they_were_made_of(kind: BlockType) -> None:
    weight = torch.randn(6, 2 * kind.size, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[1, : kind.size] = 0
    scale = ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)
    blocks = ternary_blocks(weight, kind)
    assert blocks.shape == (6, 2 * kind.nbytes)
    read = _q2_0 if kind is Q2_0 else _by_package(kind.name)
    assert torch.equal(read(blocks), ternary_codes(weight, scale) * scale.half().float())
    with pytest.raises(CheckpointError, match="a ternary matrix has scale 1e-05, which the float16 scales"):
        ternary_blocks(torch.zeros(2, kind.size), kind)


def test_the_tokenizer_in_the_file_gives_the_same_ids(tmp_path: Path) -> None:
    import_checkpoint(save_small_source(tmp_path / "source"), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", format_name="gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    source = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    for token, number in source.get_vocab().items():
        assert tokens[number] == token
    types = fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(types) == 384 and types[383] == gguf.TokenType.UNUSED
    assert types[source.eos_token_id] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"].contents() == source.eos_token_id
    assert not fields["tokenizer.ggml.add_bos_token"].contents()
    only_file = tmp_path / "only"
    only_file.mkdir()
    (tmp_path / "out" / "model.gguf").rename(only_file / "model.gguf")
    state = json.loads(source.backend_tokenizer.to_str())
    assert fields["tokenizer.ggml.pre"].contents() == pre_tokenizer_name(state)
    assert [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()] == [
        tuple(pair) for pair in state["model"]["merges"]
    ]


def _bpe(*steps: dict[str, Any], **model: Any) -> dict[str, Any]:
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"model": {"type": "BPE", "merges": [["a", "b"]], **model}, "pre_tokenizer": pre}


_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = _WORDS | {"use_regex": False}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (_bpe(_WORDS), "gpt-2"),
        (_bpe({"type": "Digits", "individual_digits": True}, _WORDS), "smollm"),
        (_bpe({"type": "Digits", "individual_digits": False}, _WORDS), None),
        (_bpe(_split(_LLAMA3), _BYTES, ignore_merges=True), "llama-bpe"),
        (_bpe(_split(_LLAMA3), _BYTES), "smaug-bpe"),
        (_bpe(_split(_LLAMA3.replace("{1,3}", "")), _BYTES), "qwen2"),
        (_bpe(_split(_LLAMA3.replace("{1,3}", "{1,2}")), _BYTES), None),
        (_bpe(_WORDS | {"add_prefix_space": True}), None),
        (_bpe(_WORDS, byte_fallback=True), None),
        ({"model": {"type": "Unigram"}, "pre_tokenizer": None}, None),
    ],
)
def test_how_text_is_cut_has_llama_cpps_name_or_none(state: dict[str, Any], name: str | None) -> None:
    assert pre_tokenizer_name(state) == name


WITH_NORMS = dict.fromkeys(("share_embeddings_and_output_weights", "attn_sub_norm", "ffn_sub_norm"), True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixers": ["gla"]}, "gated linear attention layers"),
        ({"mixers": ["swa"]}, "sliding-window layers"),
        ({"spiking": SpikingConfig([Projection.mlp_fc2])}, "spikes"),
        ({"quantization": QuantizationConfig([Projection.mlp_fc2])}, "INT8 weights"),
        ({"activation_func": ActivationFunc.relu}, "feed-forwards with model.activation_func=relu;"),
        ({"attn_sub_norm": True}, "norms in front of output projections"),
        (
            {**WITH_NORMS, "activation_func": ActivationFunc.relu2},
            "model.activation_func=relu2, where llama.cpp's architecture of sub-norms computes SiLU;",
        ),
        (
            {**WITH_NORMS, "share_embeddings_and_output_weights": False},
            "an output layer of its own beside sub-norms, where llama.cpp takes the embedding;",
        ),
        (
            {**WITH_NORMS, "add_qkv_bias": True, "add_output_bias": True},
            "biases of attention beside sub-norms, which llama.cpp does not read;",
        ),
        ({**WITH_NORMS, "kv_channels": 16}, "heads that together are not as wide as hidden_size"),
        (
            {"rope_scaling": RopeScalingConfig(rope_type=RopeType.yarn, factor=2.0)},
            "rotary scaling of type yarn",
        ),
        (
            {"ternary": TernaryConfig([Projection.mlp_fc2]), "ffn_hidden_size": 48},
            "ternary weights of 48 inputs, which 32 does not divide",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=f"--format gguf cannot hold .*{words}"):
        format_of_model(replace(LLAMA, **changes), "gguf")
    assert format_of_model(LLAMA).name == ""  # it is never chosen


@pytest.fixture(scope="module")
def trained(llama_cpp: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 inputs with a scale a token."""
    return _counting_model(tmp_path_factory.mktemp("trained"), int8_inputs=Int8InputsConfig(LINEARS))


@pytest.fixture(scope="module")
def trained_for_it(llama_cpp: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 inputs in llama.cpp's blocks."""
    return _counting_model(tmp_path_factory.mktemp("trained_for_it"), q8_inputs=Q8InputsConfig(LINEARS))


def _counting_model(folder: Path, **inputs: Any) -> Path:
    """A checkpoint of ternary weights that has learnt to count in sevens.

    So one token is far above the others, and greedy texts are no matter of the last bit.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": TOKENS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(folder / "hf")
    import_checkpoint(folder / "hf", folder / "start")
    (path,) = (folder / "start").glob("iter_*/" + MODEL_CONFIG_FILE)
    model = load_model_config(path)
    save_config(replace(model, ternary=TernaryConfig(LINEARS), **inputs), path)
    export_checkpoint(folder / "start", folder / "own", format_name="spikingbrain")
    network: Any = SpikingBrainForCausalLM.from_pretrained(folder / "own", dtype=torch.float32).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(80):
        text = counting(torch.randint(0, TOKENS, (16,)), 24)
        loss = network(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    network.save_pretrained(folder / "after")
    import_checkpoint(folder / "after", folder / "megatron")
    return folder


TOKENS = 97


def counting(first: Tensor, length: int) -> Tensor:
    """[batch, length] token ids, each seven above the one before."""
    return (first.unsqueeze(-1) + 7 * torch.arange(length)) % TOKENS


def _as_llama_cpp(x: Tensor, size: int) -> Tensor:
    """Inputs as its INT8 products read them: Q8_0 for 32 neighbours, Q8_K for 256 (ggml-quants.c)."""
    blocks = x.unflatten(-1, (-1, size))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    if size == 32:
        scale = largest.abs() / 127
        codes, held = (blocks / scale.clamp(min=1e-30)).round(), scale.half().float()
    else:
        held = largest / -127
        codes = (blocks / torch.where(largest == 0, 1, held)).round().clamp(max=127)
    return (codes * held).flatten(-2)


@torch.no_grad()
def rounding_as_llama_cpp(folder: Path, format_name: str) -> Any:
    """transformers' Llama of what the GGUF file holds, inputs of its linears rounded as llama.cpp does."""
    network: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in network.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            scale = ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype)
            held = scale if format_name == "gguf_q2_0" else scale.half().float()
            module.weight.copy_(ternary_codes(weight, scale) * held)
            size = 256 if weight.shape[1] % 256 == 0 else 32
            module.register_forward_pre_hook(lambda _, inputs, size=size: (_as_llama_cpp(inputs[0], size),))
    return network


def read_by(llama_cpp: Any, folder: Path) -> Any:
    """The client, computing on one thread with float32 keys and values."""
    return llama_cpp.Llama(
        str(folder / "model.gguf"),
        **{"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False},
        **{"type_k": 0, "type_v": 0},
    )


def logits_of(llm: Any, text: Tensor) -> Tensor:
    """[tokens, vocabulary] for [tokens] ids."""
    llm.reset()
    llm.eval(text.tolist())
    return torch.tensor(llm.scores[: len(text)])


SCALED = RopeScalingConfig(rope_type=RopeType.linear, factor=2.0)


needs_llama_cpp = pytest.mark.timeout(1800)  # it may have to be built, beside other tests


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(
    "model",
    [*MODELS.values(), replace(LLAMA, rope_scaling=SCALED), SUB_NORMS],
    ids=[*MODELS, "positions scaled", "sub-norms"],
)
def test_llama_cpp_computes_the_same_from_floats(
    model: ModelConfig, llama_cpp: Any, ranks: RankPool, tmp_path: Path
) -> None:
    expected = saved(ranks, model, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", format_name="gguf")
    logits = logits_of(read_by(llama_cpp, tmp_path / "out"), TEXT[0])
    assert (logits - expected.logits[0]).abs().max() <= TOLERANCE


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_computes_the_same_from_ternary_weights_behind_sub_norms(
    llama_cpp: Any, ranks: RankPool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 256}
    transforms = {"ternary": TernaryConfig(LINEARS), "q8_inputs": Q8InputsConfig(LINEARS)}
    expected = saved(ranks, replace(SUB_NORMS, **sizes, **transforms), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", format_name="gguf_q2_0")
    off = (logits_of(read_by(llama_cpp, tmp_path / "out"), TEXT[0]) - expected.logits[0]).abs()
    assert off.max() <= TOLERANCE


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("format_name", ["gguf", "gguf_q2_0"])
def test_llama_cpp_writes_the_same_tokens(
    format_name: str, llama_cpp: Any, trained: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained / "megatron", tmp_path / "out", format_name=format_name)
    export_checkpoint(trained / "megatron", tmp_path / "llama", format_name="llama", float_weights=True)
    text = counting(torch.tensor([5]), 40)
    text[:, 20:] = torch.randint(0, TOKENS, (20,), generator=torch.Generator().manual_seed(1))
    ours: Any = SpikingBrainForCausalLM.from_pretrained(trained / "after", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = ours(text).logits
        as_it_rounds = rounding_as_llama_cpp(tmp_path / "llama", format_name)(text).logits
    llm = read_by(llama_cpp, tmp_path / "out")
    logits = logits_of(llm, text[0])
    assert logits.std() > 1
    # Where an input lies between two INT8 numbers a sum's last bit decides: noise of 1e-6 makes 0.02.
    assert (logits - as_it_rounds).abs().max() <= 0.03
    # What another scale for each 32 or 256 inputs makes of them, instead of one for each token.
    assert (logits - expected).abs().max() <= 0.1
    for prompt in (text[:, :20], text[:, 12:30]):
        found = greedy_tokens(llm, prompt[0])
        assert found == written_by(ours, prompt)
    assert found[:3] == counting(prompt[0, -1:], 4)[0, 1:].tolist()


def greedy_tokens(llm: Any, prompt: Tensor) -> list[int]:
    """NEW_TOKENS ids behind a prompt of [tokens] ids."""
    llm.reset()
    llm.eval(prompt.tolist())
    found: list[int] = []
    for _ in range(NEW_TOKENS):
        found.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(found[-1:])
    return found


def written_by(network: Any, prompt: Tensor) -> list[int]:
    """The same by transformers, behind [1, tokens] ids."""
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    written = network.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)
    tokens: list[int] = written[0, prompt.shape[1] :].tolist()
    return tokens


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(("format_name", "bound"), [("gguf", 0.02), ("gguf_q2_0", TOLERANCE)])
def test_llama_cpp_computes_what_a_model_with_its_blocks_was_trained_with(
    format_name: str, bound: float, llama_cpp: Any, trained_for_it: Path, tmp_path: Path
) -> None:
    report = export_checkpoint(trained_for_it / "megatron", tmp_path / "out", format_name=format_name)
    assert any("as training did" in note for note in report.notes)
    ours: Any = SpikingBrainForCausalLM.from_pretrained(trained_for_it / "after", dtype=torch.float32).eval()
    texts = torch.randint(0, TOKENS, (6, 40), generator=torch.Generator().manual_seed(1))
    texts[:, :20] = counting(texts[:, 0], 20)
    with torch.no_grad():
        expected = ours(texts).logits
    llm = read_by(llama_cpp, tmp_path / "out")
    off = torch.stack([logits_of(llm, text) for text in texts]).sub_(expected).abs()
    # Where an input lies between two INT8 numbers a sum's last bit decides: 0.03 makes one of these.
    assert expected.std() > 1 and off.max() <= 0.05
    assert off.quantile(0.9) <= bound
    for text in texts[:, :20]:
        found = greedy_tokens(llm, text)
        assert found == written_by(ours, text.unsqueeze(0))
