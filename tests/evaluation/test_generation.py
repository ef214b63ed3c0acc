"""Generation as tools/generate.py does it: the text, as it comes, and the memory it took."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.generate_command_line import generate
from spikingbrain_train.evaluation.generation import Sampling, cache_size, generate_text
from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM
from spikingbrain_train.models.mixers.decoding import CacheSize
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

PROMPT = "The for statement"
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def hybrid() -> GLAswaForCausalLM:
    torch.manual_seed(0)
    return GLAswaForCausalLM(
        GLAswaConfig(
            vocab_size=MODEL_VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            attention_window=7,
            eos_token_id=None,
        )
    ).eval()


def test_greedy_text_takes_the_likeliest_token_of_a_full_pass_each_time(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    # A folder may bring sampling settings of its own; greedy means greedy.
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=3)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        if following.item() == tokenizer.eos_token_id:
            break
    shown: list[str] = []
    generation = generate_text(model, tokenizer, PROMPT, GREEDY, shown.append)
    assert generation.text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert "".join(shown) == generation.text
    assert generation.prompt_tokens + generation.new_tokens == ids.shape[1]
    assert generation.tokens_per_second is not None and generation.tokens_per_second > 0


def test_sampling_repeats_with_its_seed(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(source)

    def sample(seed: int) -> str:
        choice = Sampling(max_new_tokens=16, temperature=1.5, top_p=1.0, seed=seed)
        return generate_text(model, tokenizer, PROMPT, choice, lambda text: None).text

    assert sample(1) == sample(1) != sample(2)


def test_cache_of_a_hybrid_stops_growing_at_its_windows(source: Path, hybrid: GLAswaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes = [
        generate_text(
            hybrid, tokenizer, PROMPT, Sampling(max_new_tokens=count, temperature=1.0), lambda text: None
        ).cache
        for count in (20, 80)
    ]
    # 2 GLA layers of [1, 2, 8, 8] float32; 2 windows of 6 tokens of [2, 8] keys and values.
    expected = CacheSize(recurrent=2 * 2 * 8 * 8 * 4, windowed=2 * 2 * 6 * 2 * 8 * 4, windowed_limit=1536)
    assert sizes[0] == sizes[1] == expected
    assert "growing" not in expected.describe()


def test_cache_of_a_mamba_of_transformers_does_not_grow() -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with torch.no_grad():
        caches = [model(torch.ones(1, n, dtype=torch.long), use_cache=True).cache_params for n in (4, 9)]
    # Of 2 layers of 32 channels four inputs of the convolution and a state of four, in float32.
    assert [cache_size(cache) for cache in caches] == 2 * [CacheSize(recurrent=2 * 32 * (4 + 4) * 4)]


def test_recurrent_models_of_transformers_are_not_read_in_pieces(source: Path) -> None:
    """Their classes read on from a cache by one token at a time."""
    sizes = {"vocab_size": MODEL_VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    pieces = replace(GREEDY, prefill_chunk=2)
    with pytest.raises(ConfigurationError, match="in pieces, which transformers' MambaForCausalLM cannot"):
        generate_text(model, tokenizer, PROMPT, pieces, lambda text: None)


def test_angles_that_depend_on_the_whole_prompt_need_it_at_once(
    source: Path, hybrid: GLAswaForCausalLM
) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    config = type(hybrid.config)(**{**hybrid.config.to_dict(), "rope_parameters": scaling})
    model = GLAswaForCausalLM(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    generate_text(model, tokenizer, PROMPT, GREEDY, lambda text: None)
    with pytest.raises(ConfigurationError, match="rotary positions depend on the length of the whole"):
        generate_text(model, tokenizer, PROMPT, replace(GREEDY, prefill_chunk=2), lambda text: None)


def test_limit_of_the_windows_is_known_before_it_is_reached(hybrid: GLAswaForCausalLM) -> None:
    with torch.no_grad():
        cache = hybrid(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    size = cache_size(cache)
    assert size.windowed == 1536 * 2 // 6 and size.windowed_limit == 1536


def test_a_window_of_one_token_remembers_nothing(hybrid: GLAswaForCausalLM) -> None:
    config = type(hybrid.config)(**{**hybrid.config.to_dict(), "sliding_window": 0, "attention_window": 1})
    with torch.no_grad():
        cache = GLAswaForCausalLM(config).eval()(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    size = cache_size(cache)
    assert (size.windowed_limit, size.unbounded) == (0, 0) and size.recurrent > 0


def test_cache_of_a_dense_model_grows(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    with torch.no_grad():
        sizes = [cache_size(model(torch.ones(1, n, dtype=torch.long)).past_key_values) for n in (4, 8)]
    assert sizes[0].unbounded * 2 == sizes[1].unbounded == 4 * 2 * 8 * 2 * 8 * 4
    assert "growing with every token" in sizes[1].describe()


def test_command_line_streams_and_writes_the_result(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "generate.json"
    generate(
        ["--model", str(source), "--prompt", PROMPT, "--max-new-tokens", "5", "--temperature", "0"]
        + ["--device", "cpu", "--output", str(result)]
    )
    out = capsys.readouterr().out
    written = json.loads(result.read_text())
    assert out.startswith(written["text"]) and written["text"].startswith(PROMPT)
    assert f"{written['prompt_tokens']} tokens read, {written['new_tokens']} written at" in out
    assert "cache: " in out


def test_a_folder_without_a_tokenizer_is_not_taken_for_an_empty_prompt(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens_map.json"))
    with pytest.raises(SystemExit) as ended:
        generate(["--model", str(bare), "--prompt", PROMPT, "--device", "cpu"])
    assert ended.value.code == 2
    assert f"error: {bare} holds no tokenizer files; copy those of the source" in capsys.readouterr().err


def test_empty_prompt_is_refused(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with pytest.raises(ConfigurationError, match="--prompt is empty"):
        generate_text(model, AutoTokenizer.from_pretrained(source), "", GREEDY, lambda text: None)


@pytest.mark.parametrize(
    ("setting", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_impossible_sampling_is_one_sentence(
    source: Path, capsys: pytest.CaptureFixture[str], setting: str, value: float
) -> None:
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(SystemExit) as exit_:
        generate(["--model", str(source), "--prompt", PROMPT, f"{flag}={value}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} is {value}") and error.count("\n") == 1
