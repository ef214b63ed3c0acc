"""A prompt for a chat model is what its template makes of a user's words, and it says where answers end."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.chat_prompts import chat_prompt, check_chat_options
from spikingbrain_train.evaluation.generate_command_line import generate_parser

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = Tokenizer(models.BPE(vocab=letters, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    made.chat_template = TEMPLATE
    return made


def test_a_prompt_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = chat_prompt(tokenizer, Path("model"), "What?", "Be brief.")
    assert prompt.text == (
        "<|start|>system\nBe brief.<|stop|>\n<|start|>user\nWhat?<|stop|>\n<|start|>assistant\n"
    )
    assert prompt.ends == {tokenizer.convert_tokens_to_ids("<|stop|>")}
    assert chat_prompt(tokenizer, Path("model"), "What?").text.startswith("<|start|>user")


def test_what_has_no_template_or_a_template_that_refuses_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(DataError, match="the tokenizer in model has no chat template, which --chat needs"):
        chat_prompt(bare, Path("model"), "What?")
    bare.chat_template = TEMPLATE.replace("'tool'", "'system'")
    with pytest.raises(DataError, match="refuses the conversation .no tools.; leave --system out"):
        chat_prompt(bare, Path("model"), "What?", "Be brief.")
    arguments = generate_parser().parse_args(["--model", "m", "--prompt", "x", "--system", "y"])
    with pytest.raises(ConfigurationError, match="add --chat, or leave it out"):
        check_chat_options(arguments)
