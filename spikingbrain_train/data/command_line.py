"""Arguments of spikingbrain-preprocess."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from spikingbrain_train.config.command_line import called_as
from spikingbrain_train.data.preprocess import plan_preprocessing, preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.errors import SpikingBrainError

_DESCRIPTION = "Tokenize text into Megatron indexed datasets (.bin/.idx) for spikingbrain-train."

_EXAMPLES = """\
examples:
  # Python's own documentation, 15 % of the topics held out: writes data/pydoc_train.* and data/pydoc_valid.*
  spikingbrain-preprocess --input pydoc-topics --tokenizer models/SmolLM2-135M --output-prefix data/pydoc \\
      --valid-fraction 0.15

  # compressed JSON lines whose text is in the field "content", on 8 processes
  spikingbrain-preprocess --input 'corpus/*.jsonl.zst' --text-key content --tokenizer models/Qwen2.5-7B \\
      --output-prefix data/corpus --workers 8

  # a folder of text files and a sentencepiece tokenizer; only check and estimate
  spikingbrain-preprocess --input books/ --tokenizer tokenizer.model --output-prefix data/books --dry-run

inputs:
  .jsonl, .ndjson, .json   one JSON object a line, the text in --text-key
  .txt, .md, .rst          one document a file (--max-text-chars cuts long ones)
  each also with .gz or .zst; globs are expanded; folders are searched recursively, links are followed, hidden
  sub-folders and the .json files of tokenized datasets are left out; what is not read is counted at the end
  pydoc-topics             the documentation topics that every Python carries

Every document ends with the tokenizer's end-of-sequence token. The output does not depend on --workers, and
appears only when it is complete.
"""


def preprocess_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-preprocess."""
    parser = argparse.ArgumentParser(
        prog=called_as(),
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, globs, pydoc-topics",
    )
    parser.add_argument("--output-prefix", required=True, help="path of the dataset, without .bin/.idx")
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face tokenizer folder or sentencepiece .model file"
    )
    parser.add_argument(
        "--text-key", default="text", help="JSON field that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of documents, chosen by a hash of their text, that goes to <prefix>_valid instead of "
        "<prefix>_train (default: no split)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: %(default)s, all cores)",
    )
    parser.add_argument(
        "--max-text-chars",
        type=int,
        metavar="N",
        help="cut text files at blank lines into documents of at most N characters "
        "(default: one document a file)",
    )
    parser.add_argument(
        "--skip-bad-documents",
        action="store_true",
        help="leave malformed and empty documents out and count them, instead of stopping at the first",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset that exists at the prefix"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and estimate sizes; write nothing"
    )
    return parser


def preprocess_data(arguments: list[str] | None = None) -> int:
    """spikingbrain-preprocess. Returns the exit code."""
    parsed = vars(preprocess_parser().parse_args(arguments))
    dry_run = parsed.pop("dry_run")
    # Slurm ends a job with SIGTERM: leave as after Ctrl-C, which removes temporary files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = PreprocessOptions(**parsed)
        outcome = plan_preprocessing(options) if dry_run else preprocess(options, progress=True)
        print(outcome.describe())
    except SpikingBrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: temporary files are removed", file=sys.stderr)
        return 130
    return 0
