"""Tokens per second of spikingbrain-preprocess against a plain loop and datasets.map with the same tokenizer.

python benchmarks/preprocess.py --tokenizer models/SmolLM2-135M --input corpus.jsonl.zst --megabytes 8

datasets.map is batched, with as many processes as the tool has workers, on JSON lines that are loaded
already; `--without-loop` leaves the plain loop out.

The plain loop is what one writes without a tool: read a JSON line, call the transformers tokenizer on its
text, append the ids and the end-of-sequence token to a list; at the end, one array is saved. Contestants take
turns, and the best of their rounds counts, because other programs on the machine only ever slow them down.
The tool is charged for loading its tokenizer and starting its processes, the loop is not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spikingbrain_train.data.documents import find_sources
from spikingbrain_train.data.encoders import TokenizerBackend
from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def cpu_time() -> float:
    """CPU seconds of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def plain_loop(corpus: Path, tokenizer: PreTrainedTokenizerBase, output: Path) -> int:
    """The loop one would write by hand; returns the number of tokens."""
    ids: list[int] = []
    with corpus.open() as file:
        for line in file:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
    np.save(output, np.asarray(ids, dtype=np.uint16 if len(tokenizer) < 65500 else np.int32))
    return len(ids)


def datasets_map(corpus: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, workers: int) -> float:
    """What the documentation of datasets shows; returns the seconds of map alone."""
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(folder / "hf")
    )

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    started = time.perf_counter()
    loaded.map(
        encode,
        batched=True,
        num_proc=workers,
        remove_columns=loaded.column_names,
        load_from_cache_file=False,
        cache_file_name=str(folder / "mapped.arrow"),
    )
    return time.perf_counter() - started


def tool(corpus: Path, tokenizer: str, output: Path, workers: int, backend: str = "tokenizers") -> int:
    """The preprocessing pipeline with everything it needs to start; returns the number of tokens."""
    chosen = TokenizerBackend(backend)
    options = PreprocessOptions(
        [str(corpus)], str(output), tokenizer, workers=workers, overwrite=True, tokenizer_backend=chosen
    )
    return sum(info.tokens for info in preprocess(options, progress=False).datasets.values())


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
    parser.add_argument("--backends", nargs="+", default=["tokenizers"], help="tokenizers, gigatoken")
    parser.add_argument("--without-loop", action="store_true", help="measure datasets.map and the tool alone")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()

    # Not at the top: worker processes import this file again, which would charge the tool for transformers'
    # import.
    from transformers import AutoTokenizer

    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = arguments.tokenizer
        reference = AutoTokenizer.from_pretrained(path, local_files_only=True)
        corpus = folder / "corpus.jsonl"
        write_corpus(arguments.input, arguments.text_key, arguments.megabytes, corpus)
        size = corpus.stat().st_size / 1e6
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores
        peer = f"datasets.map, num_proc={arguments.workers}"
        contestants: dict[str, Callable[[], float]] = {}
        if not arguments.without_loop:
            contestants["plain loop"] = lambda: plain_loop(corpus, reference, folder / "plain.npy")
        contestants[peer] = lambda: datasets_map(corpus, reference, folder, arguments.workers)
        for backend in arguments.backends:
            for workers in sorted({1, arguments.workers}):
                contestants[f"tool, {backend}, --workers {workers}"] = partial(
                    tool, corpus, path, folder / f"d_{backend}", workers, backend
                )
        for _ in range(arguments.rounds):
            found: dict[str, tuple[float, float]] = {}
            for contestant, run in contestants.items():
                seconds, cpu_seconds = time.perf_counter(), cpu_time()
                result = run()
                seconds, cpu_seconds = time.perf_counter() - seconds, cpu_time() - cpu_seconds
                if contestant == peer:  # it says itself how long it took, without reading JSON
                    seconds = result
                else:
                    tokens = int(result)
                found[contestant] = (seconds, cpu_seconds)
            for contestant, measured in found.items():
                speeds = tuple(tokens / each for each in measured)
                before = best.get(contestant, (0.0, 0.0))
                best[contestant] = (max(before[0], speeds[0]), max(before[1], speeds[1]))
        written = [(folder / f"d_{backend}.bin").read_bytes() for backend in arguments.backends]
        assert len(set(written)) == 1
        if not arguments.without_loop:
            assert written[0] == np.load(folder / "plain.npy").tobytes()

    load = os.getloadavg()[0]
    print(f"{tokens:,} tokens, {size:.1f} MB, best of {arguments.rounds} rounds, machine load {load:.1f}\n")
    print("| | tokens/s | ratio | tokens per CPU second | ratio |\n|---|---|---|---|---|")
    first = best[peer]
    for contestant, (speed, per_cpu) in best.items():
        print(
            f"| {contestant} | {speed:,.0f} | {speed / first[0]:.2f} x "
            f"| {per_cpu:,.0f} | {per_cpu / first[1]:.2f} x |"
        )


if __name__ == "__main__":
    main()
