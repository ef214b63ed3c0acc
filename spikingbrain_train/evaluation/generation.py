"""Text from a Hugging Face model, shown as it comes, with its speed and the memory that it needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from spikingbrain_train.config.require import require
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.chat_prompts import ChatPrompt
from spikingbrain_train.evaluation.sampling import AUTOMATIC_PIECE, Sampling, check_prompt_length
from spikingbrain_train.models.mixers.decoding import CacheSize


@dataclass
class Generation:
    """What came out."""

    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float | None
    """Of the recurrence: the first new token, which reads the prompt, is left out. None with one token."""
    cache: CacheSize
    text: str
    """Prompt and what follows it."""

    def describe(self) -> str:
        """Lines behind the text."""
        speed = "" if self.tokens_per_second is None else f" at {self.tokens_per_second:.1f} tokens/s"
        counted = f"{self.prompt_tokens} tokens read, {self.new_tokens} written{speed}"
        return f"\n\n{counted}\ncache: {self.cache.describe()}"


class TimedStreamer(TextStreamer):
    """Hands text on as soon as it is complete, and notes when tokens came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._show = show
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    @property
    def tokens_per_second(self) -> float | None:
        """Of tokens behind the first new one; None with one token."""
        # The streamer is given the prompt once, then one token at a time.
        steps = len(self.times) - 2
        seconds = self.times[-1] - self.times[1] if steps > 0 else 0.0
        return steps / seconds if seconds > 0 else None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | ChatPrompt,
    sampling: Sampling,
    show: Callable[[str], None],
) -> Generation:
    """Continue ``prompt``.

    Args:
        model: any causal language model of transformers; its generation_config is replaced.
        tokenizer: its tokenizer.
        prompt: text, at least one token; or a chat, whose answer ends where the template ends it.
        sampling: how.
        show: called with pieces of text, the prompt first.

    Raises:
        ConfigurationError: the prompt has no token or more than the model has positions, or cannot be read in
            pieces.
    """
    ends: frozenset[int] = frozenset()
    if isinstance(prompt, ChatPrompt):
        ends = prompt.ends
        inputs = tokenizer(prompt.text, return_tensors="pt", add_special_tokens=False).to(model.device)
    else:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    num_tokens = inputs["input_ids"].shape[1]
    if num_tokens == 0:
        raise ConfigurationError("--prompt is empty; give at least one word to go on from")
    check_prompt_length(num_tokens, _rotary_limit(model))
    piece_length = _piece_length(model, sampling)
    torch.manual_seed(sampling.seed)
    streamer = TimedStreamer(tokenizer, show)
    # Replaced, not passed: generate() fills what a passed config leaves open with the model's own sampling
    # settings.
    model.generation_config = _generation_config(model, tokenizer, sampling, ends)
    if piece_length is not None and num_tokens > piece_length:
        model.generation_config.prefill_chunk_size = piece_length
    output: Any = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        streamer=streamer,
        return_dict_in_generate=True,
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    return Generation(
        prompt_tokens=prompt_tokens,
        new_tokens=output.sequences.shape[1] - prompt_tokens,
        tokens_per_second=streamer.tokens_per_second,
        cache=cache_size(output.past_key_values),
        text=str(tokenizer.decode(output.sequences[0], skip_special_tokens=True)),
    )


def _rotary_limit(model: PreTrainedModel) -> int | None:
    """Tokens that rotary positions are declared for; None where the model knows no such number."""
    if _is_ours(model) and not any(getattr(module, "reads_rotary", False) for module in model.modules()):
        return None
    return getattr(model.config, "max_position_embeddings", None)


def _is_ours(model: PreTrainedModel) -> bool:
    """Whether it brings the code of an export, which reads on from its cache by any number of tokens."""
    return hasattr(model, "cache_class") and hasattr(model.config, "rotary_positions")


def _piece_length(model: PreTrainedModel, sampling: Sampling) -> int | None:
    """Tokens of a prompt that are read at a time; None: all."""
    if not _is_ours(model):
        require(
            sampling.prefill_chunk is None or not getattr(model, "_is_stateful", False),
            f"--prefill-chunk reads a prompt in pieces, which transformers' {type(model).__name__} cannot; "
            "leave it out, or import the folder with spikingbrain-convert",
        )
        return sampling.prefill_chunk
    if model.config.rotary_positions().depends_on_length:
        require(
            sampling.prefill_chunk is None,
            "--prefill-chunk reads a prompt in pieces, but this model's rotary positions depend on the "
            "length of the whole; leave it out, or give the Megatron checkpoint",
        )
        return None
    return sampling.prefill_chunk or AUTOMATIC_PIECE


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    ends: frozenset[int],
) -> GenerationConfig:
    # The source's own generation_config names its end tokens; chat models have several.
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    end = tokenizer.eos_token_id if end is None else end
    if ends:
        known = end if isinstance(end, list) else [end]
        end = sorted({*ends, *(token for token in known if token is not None)})
    choice = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.temperature > 0
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        **choice,
    )


def cache_size(cache: Any) -> CacheSize:
    """Bytes in a cache of transformers, or in the ``RecurrentCache`` of an exported hybrid (batch of one)."""
    recurrent = windowed = windowed_limit = unbounded = 0
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "state_BGKV") or hasattr(layer, "states"):
            recurrent += layer.nbytes()
        elif hasattr(layer, "recurrent_states"):  # of transformers, with the last inputs of convolutions
            for states in (layer.conv_states, layer.recurrent_states):
                # Releases keep one tensor, or several by number.
                kept = states.values() if isinstance(states, dict) else (states,)
                recurrent += sum(x.untyped_storage().nbytes() for x in kept if x is not None)
        elif hasattr(layer, "k_BGSK"):
            if layer.window is None:
                unbounded += layer.nbytes()
            elif layer.k_BGSK is not None:
                windowed += layer.nbytes()
                sinks = layer.sinks_nbytes()
                of_a_token = (layer.nbytes() - sinks) // max(1, layer.k_BGSK.shape[2])
                windowed_limit += sinks + of_a_token * (layer.window - 1)
        elif layer.keys is not None:
            held = sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
            if getattr(layer, "is_sliding", False):
                windowed += held
                windowed_limit += held // max(1, layer.keys.shape[-2]) * (layer.sliding_window - 1)
            else:
                unbounded += held
    return CacheSize(recurrent, windowed, windowed_limit, unbounded)
