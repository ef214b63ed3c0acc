#!/usr/bin/env python
"""How fast an INT8 export reads a prompt and writes on a CPU, beside the same export in floats.

    python benchmarks/int8_inference.py --model outputs/smollm2/rows

The twin in floats encodes the same spikes and multiplies what the INT8 numbers stand for, in bfloat16 and in
float32, and the export itself is loaded in both; the ratio is that of the faster ones. All take turns in one
process, the best of several rounds counts; bfloat16 is left out (--formats) on CPUs without products of such
numbers. Without --model a hybrid of random weights is made: --hidden-size, --layers, --group-size.
Times are of this process's CPU, on one thread, so that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM
from spikingbrain_train.hf.quantization_w8aspike import (
    W8ASpikeEmbedding,
    W8ASpikeLinear,
    encoded_input,
    replace_module,
)

FLOAT_FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FloatTwin(nn.Module):
    """What a W8ASpikeLinear computes, in floats."""

    def __init__(self, linear: W8ASpikeLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation, self.k = linear.activation, linear.k
        self.weight = nn.Parameter(linear.float_weight().to(dtype), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(encoded_input(x, self.activation, self.k), self.weight, self.bias)


def twin_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model in floats."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        kind = type(module).__name__  # of the folder's own code, where one was loaded
        if kind == W8ASpikeLinear.__name__:
            replace_module(twin, name, FloatTwin(module, dtype))
        elif kind == W8ASpikeEmbedding.__name__:
            table = nn.Embedding(module.num_embeddings, module.embedding_dim, dtype=dtype)
            with torch.no_grad():
                table.weight.copy_(module(torch.arange(module.num_embeddings)))
            replace_module(twin, name, table)
    return twin.to(dtype).eval()


def random_model(hidden_size: int, layers: int, group_size: int | None) -> PreTrainedModel:
    """A hybrid in the published proportions with random codes; spikes and keys and values as published."""
    spikes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "spikes")
    settings = {
        "quant_method": "w8aspike",
        "group_size": group_size,
        "linears": {**spikes, "down_proj": "int8", "lm_head": "int16"},
        "k": 3.0,
        "embeddings": True,
        "keys_and_values": True,
    }
    config = GLAswaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=max(1, hidden_size // 512),
        intermediate_size=hidden_size * 4,
        attention_window=512,
        quantization_config=settings,
    )
    model = GLAswaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, (W8ASpikeLinear, W8ASpikeEmbedding)):
            module.weight.data = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8)
            module.weight_scale.data.fill_(2.0**-11)
    return model.eval()


@torch.no_grad()
def prompt_seconds(model: PreTrainedModel, length: int) -> float:
    """Read a prompt and give the next token's logits."""
    ids = torch.arange(length).unsqueeze(0) % 1000
    started = time.process_time()
    model(ids, logits_to_keep=1, use_cache=True)
    return time.process_time() - started


@torch.no_grad()
def decode_seconds(model: PreTrainedModel, tokens: int) -> float:
    """Seconds a token behind a short prompt."""
    output = model(torch.arange(32).unsqueeze(0), use_cache=True)
    token = torch.tensor([[1]])
    started = time.process_time()
    for _ in range(tokens):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return (time.process_time() - started) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder that spikingbrain-quantize wrote; its code is run")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--group-size", type=int, help="of the random model (default: a row)")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=FLOAT_FORMATS, default=list(FLOAT_FORMATS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True).eval()
    else:
        model = random_model(arguments.hidden_size, arguments.layers, arguments.group_size)
    formats = {name: FLOAT_FORMATS[name] for name in arguments.formats}
    models = {f"int8, {name}": copy.deepcopy(model).to(dtype).eval() for name, dtype in formats.items()}
    models |= {name: twin_of(model, dtype) for name, dtype in formats.items()}
    print(f"| what | {' | '.join(models)} | int8 against the faster |\n|---|{'---|' * (len(models) + 1)}")
    for what, measure, amount in (
        (f"prompt of {arguments.prompt}", prompt_seconds, arguments.prompt),
        ("decode, a token", decode_seconds, arguments.decode),
    ):
        seconds = best_of(measure, models, amount, arguments.rounds)
        ratio = min(seconds[name] for name in formats) / min(seconds[f"int8, {name}"] for name in formats)
        cells = " | ".join(f"{1e3 * value:.1f} ms" for value in seconds.values())
        print(f"| {what} | {cells} | {ratio:.2f} |", flush=True)


def best_of(
    measure: Callable[[PreTrainedModel, int], float],
    models: Mapping[str, PreTrainedModel],
    amount: int,
    rounds: int,
) -> dict[str, float]:
    """The fastest of some rounds of each model, in turns; the first, which packs weights, is left out."""
    runs = [{name: measure(model, amount) for name, model in models.items()} for _ in range(rounds + 1)]
    return {name: min(run[name] for run in runs[1:]) for name in models}


if __name__ == "__main__":
    main()
