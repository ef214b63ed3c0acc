"""Tokens per second of tools/preprocess_data.py against a plain loop over the same tokenizer, in the same
run.

python benchmarks/preprocess.py --tokenizer models/SmolLM2-135M --input corpus.jsonl.zst --megabytes 8

The plain loop is what one writes without a tool: read a JSON line, call the transformers tokenizer on its
text, append the ids and the end-of-sequence token to a list; at the end, one array is saved. Contestants take
turns, and the best of their rounds counts, because other programs on the machine only ever slow them down.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spikingbrain_train.data.documents import find_sources
from spikingbrain_train.data.preprocess import PreprocessOptions, preprocess


def write_corpus(inputs: list[str], text_key: str, megabytes: float, path: Path) -> None:
    """Copy about that much text, repeating the inputs as often as needed, to an uncompressed JSON-lines
    file."""
    size = 0
    with path.open("w") as file:
        while size < megabytes * 1e6:
            for source in find_sources(inputs):
                for document in source.read():
                    line = json.dumps({"text": document.text(text_key)}) + "\n"
                    size += file.write(line)
                    if size >= megabytes * 1e6:
                        return


def plain_loop(corpus: Path, tokenizer: PreTrainedTokenizerBase, output: Path) -> tuple[int, float]:
    """Tokens and seconds of the loop one would write by hand."""
    started = time.perf_counter()
    ids: list[int] = []
    with corpus.open() as file:
        for line in file:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
    np.save(output, np.asarray(ids, dtype=np.uint16 if len(tokenizer) < 65500 else np.int32))
    return len(ids), time.perf_counter() - started


def tool(corpus: Path, tokenizer: str, output: Path, workers: int) -> tuple[int, float]:
    """Tokens and seconds of the preprocessing pipeline; starting its worker processes is included."""
    options = PreprocessOptions([str(corpus)], str(output), tokenizer, workers=workers, overwrite=True)
    report = preprocess(options, progress=False)
    return sum(info.tokens for info in report.datasets.values()), report.seconds


def main() -> None:
    """Run all contestants in turns and print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--input", nargs="+", default=["pydoc-topics"], help="text (default: pydoc-topics)")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--megabytes", type=float, default=8.0, help="text to tokenize (default: 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()

    reference = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(arguments.input, arguments.text_key, arguments.megabytes, corpus)
        size = corpus.stat().st_size / 1e6
        for _ in range(arguments.rounds):
            runs = {"plain loop": plain_loop(corpus, reference, Path(folder) / "plain.npy")}
            for workers in sorted({1, arguments.workers}):
                runs[f"tool, {workers} workers"] = tool(
                    corpus, arguments.tokenizer, Path(folder) / "d", workers
                )
            stored = np.fromfile(Path(folder) / "d.bin", dtype=np.load(Path(folder) / "plain.npy").dtype)
            assert np.array_equal(stored, np.load(Path(folder) / "plain.npy")), "the same tokens, in order"
            for name, (tokens, seconds) in runs.items():
                best[name] = max(best.get(name, 0.0), tokens / seconds)

    load = os.getloadavg()[0]
    print(
        f"{tokens:,} tokens, {size:.1f} MB of JSON lines, best of {arguments.rounds} rounds, load {load:.1f}\n"
    )
    print("| | tokens/s | ratio |\n|---|---|---|")
    for name, speed in best.items():
        print(f"| {name} | {speed:,.0f} | {speed / best['plain loop']:.2f} x |")


if __name__ == "__main__":
    main()
