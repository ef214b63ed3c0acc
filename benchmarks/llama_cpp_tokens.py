"""Claim: llama.cpp writes the tokens that we write, from a GGUF file of a model that was trained for it.

Two exports of one checkpoint, in this project's own format and as GGUF: greedy texts behind three prompts by
the first, in float32 on a CPU, and what llama.cpp would choose at every place of these texts. Beside it how
often the first would choose otherwise itself: where it reads the text at once instead of a token at a time
behind kept keys and values, and with noise of 1e-7 (relative) in its embedding, the size of float32's own
rounding; and how far the logits of both tokens are from each other where they differ:

  spikingbrain-export --checkpoint RUN --output OWN --format spikingbrain --dtype float32
  spikingbrain-export --checkpoint RUN --output GGUF --format gguf_q2_0 --dtype float32
  python benchmarks/llama_cpp_tokens.py --own OWN --gguf GGUF

llama-cpp-python is looked for as the tests do (`make llama-cpp`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village,")
NEW_TOKENS = 64
NOISE = 1e-7


def client() -> Any:
    """llama-cpp-python, installed or built for the tests."""
    sys.path.append(f"{sys.prefix}-llama-cpp")
    return importlib.import_module("llama_cpp")


def rounded_once(network: Any) -> Any:
    """The same function with ternary weights in the place of those that every call would round anew."""
    for module in network.modules():
        if "ternary" in getattr(module, "names", ()):
            place = module.names.index("ternary")
            module.weight.copy_(module.ternary.weight(module.weight, module.whole[place]))
            del module.names[place], module.whole[place]
    return network


def greedy(network: Any, prompt: Tensor) -> Tensor:
    """[1, prompt and NEW_TOKENS] ids."""
    written: Tensor = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return written


def by_llama_cpp(llm: Any, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] for [tokens] ids."""
    llm.reset()
    llm.eval(ids.tolist())
    return torch.tensor(llm.scores[: len(ids)])


@torch.no_grad()
def measure(own: Path, gguf: Path) -> None:
    """Print the counts of each prompt, and every token that differs."""
    tokenizer = AutoTokenizer.from_pretrained(own, trust_remote_code=True)
    settings: Any = {"dtype": torch.float32, "trust_remote_code": True}
    network = rounded_once(AutoModelForCausalLM.from_pretrained(own, **settings).eval())
    llm = client().Llama(
        str(gguf / "model.gguf"),
        **{"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0},
    )
    embedding = network.get_input_embeddings().weight
    plain = embedding.clone()
    noise = 1 + NOISE * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    counts = [0, 0, 0]
    for text in PROMPTS:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        ids = greedy(network, prompt)
        written, start = ids[0, prompt.shape[1] :], prompt.shape[1] - 1
        ours = network(ids).logits[0, start:-1]
        embedding.mul_(noise)
        noisy = network(ids).logits[0, start:-1]
        embedding.copy_(plain)
        theirs = by_llama_cpp(llm, ids[0])[start:-1]
        print(f"{text!r}, logits of standard deviation {ours.std():.2f}")
        several = (("llama.cpp", theirs), ("at once", ours), ("with noise", noisy))
        for number, (name, logits) in enumerate(several):
            differ = logits.argmax(-1) != written
            counts[number] += NEW_TOKENS - int(differ.sum())
            off = (logits - ours).abs()
            print(
                f"  {name}: {NEW_TOKENS - int(differ.sum())} of {NEW_TOKENS} tokens; logits {off.max():.1e} "
                f"away at most, {off.median():.1e} in the middle"
            )
            for place in differ.nonzero().flatten().tolist():
                other, chosen = int(logits[place].argmax()), int(written[place])
                gaps = [(each[place, other] - each[place, chosen]).item() for each in (logits, ours)]
                print(f"    token {place}: the other one {gaps[0]:.1e} ahead there, {gaps[1]:.1e} here")
        sys.stdout.flush()
    total = NEW_TOKENS * len(PROMPTS)
    print(
        f"llama.cpp chooses {counts[0]} of {total} tokens as we do; we, reading at once, {counts[1]}, "
        f"and with noise {counts[2]}"
    )


def main() -> None:
    """Read the flags, and measure."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--own", type=Path, required=True, help="export in the format spikingbrain")
    flags.add_argument("--gguf", type=Path, required=True, help="export in a format of GGUF")
    given = flags.parse_args()
    measure(given.own, given.gguf)


if __name__ == "__main__":
    main()
