"""CPU seconds of spikingbrain-preprocess as a whole command, for text of about a megabyte.

python benchmarks/preprocess_command.py --tokenizer models/SmolLM2-135M models/Qwen2.5-7B

Each command is a process of its own on one core, started as `python -m spikingbrain_train preprocess`; user
and system time of it and its children count, so other programs on the machine matter little. "First" has an
empty tokenizer cache and asks transformers, "later" finds the tokenizer in the cache. The best of the rounds
is printed. Beside them stands what the least such tool would do: start Python, load the tokenizer with
transformers' AutoTokenizer, encode the texts.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from preprocess import write_corpus  # the file beside this one

_PEER = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
for line in open(sys.argv[2]):
    tokenizer(json.loads(line)["text"], add_special_tokens=False)
"""


def cpu_seconds(command: list[str], cache: Path) -> float:
    """User and system time of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure every tokenizer in turns and print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", nargs="+", required=True, help="Hugging Face tokenizer folders")
    parser.add_argument("--input", nargs="+", default=["pydoc-topics"], help="text (default: pydoc-topics)")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| tokenizer | first command | later commands | AutoTokenizer and a loop |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(arguments.input, arguments.text_key, arguments.megabytes, corpus)
        for tokenizer in arguments.tokenizer:
            tool = [sys.executable, "-m", "spikingbrain_train", "preprocess", "--input", str(corpus)]
            tool += ["--tokenizer", tokenizer, "--output-prefix", str(folder / "d"), "--overwrite"]
            tool += ["--workers", "1"]
            peer = [sys.executable, "-c", _PEER, tokenizer, str(corpus)]
            first, later, plain = [], [], []
            for number in range(arguments.rounds):
                cache = folder / f"{len(tokenizer)}-{number}"
                first.append(cpu_seconds(tool, cache))
                later.append(cpu_seconds(tool, cache))
                plain.append(cpu_seconds(peer, cache))
            best = " | ".join(f"{min(seconds):.1f} s" for seconds in (first, later, plain))
            print(f"| {Path(tokenizer).name} | {best} |", flush=True)


if __name__ == "__main__":
    main()
