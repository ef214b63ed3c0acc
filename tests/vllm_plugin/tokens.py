"""A program for an environment with vLLM, greedy tokens of an export: FOLDER PROMPTS OUTPUT RANKS"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, prompts: Path, output: Path, ranks: int) -> None:
    """Answer all prompts, four at a time, and write what was answered and what vLLM knows of the model."""
    from vllm import LLM, ModelRegistry, SamplingParams

    llm = LLM(
        folder,
        trust_remote_code=True,
        dtype="float32",
        tensor_parallel_size=ranks,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=32,  # long prompts come in pieces
    )
    asked = [{"prompt_token_ids": tokens} for tokens in json.loads(prompts.read_text())]
    parameters = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    answers = [list(answer.outputs[0].token_ids) for answer in llm.generate(asked, parameters)]
    model = llm.llm_engine.model_config
    facts = {
        "registered": "GLAswaForCausalLM" in ModelRegistry.get_supported_archs(),
        "is_hybrid": model.is_hybrid,
        "has_inner_state": model.has_inner_state,
    }
    output.write_text(json.dumps({"answers": answers, **facts}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
