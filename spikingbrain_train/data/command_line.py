"""Arguments of spikingbrain-preprocess."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.data.encoders import TokenizerBackend
from spikingbrain_train.data.lengths import DatasetDescription, describe_dataset, text_histogram
from spikingbrain_train.data.packing.describe import ways_to_pack
from spikingbrain_train.data.preprocess import plan_preprocessing, preprocess
from spikingbrain_train.data.preprocess_options import (
    DOMAIN_SOURCES,
    LossOn,
    PreprocessOptions,
    check_seq_length,
)
from spikingbrain_train.data.preprocess_report import answer_table, length_table
from spikingbrain_train.data.verification import verify_dataset
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.formats import format_of
from spikingbrain_train.storage.loss_mask_format import has_loss_mask

_DESCRIPTION = "Tokenize text into Megatron indexed datasets (.bin/.idx) for spikingbrain-train."

_EXAMPLES = """\
examples:
  # Python's own documentation, 15 % of the topics held out: writes data/pydoc_train.* and data/pydoc_valid.*
  spikingbrain-preprocess --input pydoc-topics --tokenizer models/SmolLM2-135M --output-prefix data/pydoc \\
      --valid-fraction 0.15

  # compressed JSON lines whose text is in the field "content", on 8 processes
  spikingbrain-preprocess --input 'corpus/*.jsonl.zst' --text-key content --tokenizer models/Qwen2.5-7B \\
      --output-prefix data/corpus --workers 8

  # some 100,000 tokens held out, lengths of documents as a picture
  spikingbrain-preprocess --input corpus.jsonl --tokenizer models/Qwen2.5-7B --output-prefix data/corpus \\
      --valid-tokens 100000 --plot lengths.png

  # the domain of every document, by which long samples can be packed (data.pack_by_domain=true)
  spikingbrain-preprocess --input 'corpus/*.jsonl.zst' --domain-key source --tokenizer models/Qwen2.5-7B \\
      --output-prefix data/corpus

  # conversations, of which the assistant's answers are learnt (stage.kind=sft)
  spikingbrain-preprocess --input chats.jsonl --chat-key messages --loss-on assistant --seq-length 8192 \\
      --tokenizer models/Qwen2.5-7B-Instruct --output-prefix data/chats --valid-fraction 0.02

  # whether the files of a dataset are what was written
  spikingbrain-preprocess --verify data/corpus_train data/corpus_valid

  # how long the documents of datasets are that exist already, also those of Megatron-LM
  spikingbrain-preprocess --describe data/corpus_train data/corpus_valid --plot lengths.png

  # how many documents samples of 32k tokens are made of, and what packing by domain makes of that
  spikingbrain-preprocess --describe data/corpus_train --seq-length 32768

  # a folder of text files and a sentencepiece tokenizer; only check and estimate
  spikingbrain-preprocess --input books/ --tokenizer tokenizer.model --output-prefix data/books --dry-run

inputs:
  .jsonl, .ndjson, .json   one JSON object a line, the text in --text-key or a conversation in --chat-key
  .txt, .md, .rst          one document a file (--max-text-chars cuts long ones)
  .parquet                 one document a row, the same fields in columns, which alone are read
  each but the last also with .gz or .zst; globs are expanded; folders are searched recursively, links are
  followed, hidden sub-folders and the .json files of tokenized datasets are left out; what is not read is
  counted at the end
  pydoc-topics             the documentation topics that every Python carries

Every document ends with the tokenizer's end-of-sequence token; with --loss-on assistant it ends as the chat
template ends it. The output does not depend on --workers, and
appears only when it is complete; the same command goes on where it was killed or interrupted.
"""


def preprocess_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-preprocess."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
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
        "--text-key",
        default="text",
        help="JSON field, or Parquet column, that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--chat-key",
        metavar="FIELD",
        help="JSON field that holds a list of messages (role and content, or from and value) instead, of "
        "which the tokenizer's chat template makes text; every token is trained on, unless --loss-on says "
        "otherwise",
    )
    parser.add_argument(
        "--loss-on",
        type=LossOn,
        choices=list(LossOn),
        default=LossOn.all,
        metavar="{all,assistant}",
        help="which tokens of a conversation are learnt: all, for pretraining, or what the assistant says and"
        " the token that ends its turn, for stage.kind=sft: <prefix>.loss_mask stores them (default: all)",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="stage.seq_length of the training to come: say how many examples are longer; with "
        "--describe, what samples of text are made of in the ways that a run can pack them",
    )
    parser.add_argument(
        "--domain-key",
        metavar="FIELD",
        help="JSON field, or Parquet column, that names the domain of a document (meta.source: one inside "
        "another), stored for "
        "data.pack_by_domain",
    )
    parser.add_argument(
        "--domain-from",
        choices=DOMAIN_SOURCES,
        help="take the file, or the folder, that a document lies in as its domain; beside --domain-key for "
        "documents without fields",
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
        "--valid-tokens",
        type=int,
        metavar="N",
        help="hold out that many tokens instead, as nearly as whole documents allow",
    )
    parser.add_argument(
        "--valid-token-fraction",
        type=float,
        metavar="F",
        help="hold out that share of the tokens instead, as nearly as whole documents allow",
    )
    parser.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="N",
        help="another number holds other documents out (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one a core; where gigatoken tokenizes, one for each 256 MB and no more, as "
        "it is done with that before further ones have started)",
    )
    parser.add_argument(
        "--tokenizer-backend",
        type=TokenizerBackend,
        choices=list(TokenizerBackend),
        default=TokenizerBackend.auto,
        metavar="{auto,gigatoken,tokenizers}",
        help="library that makes tokens of text: gigatoken where it is installed, takes the tokenizer and "
        "gives the same ids on a sample of the inputs, else tokenizers; the ids are the same (default: auto)",
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
    parser.add_argument(
        "--describe",
        nargs="+",
        action=_DescribeAction,
        metavar="PREFIX",
        help="say how long the documents of existing datasets are, and write none; with --plot, --json",
    )
    parser.add_argument(
        "--verify",
        nargs="+",
        action=_DescribeAction,
        metavar="PREFIX",
        help="hold all files of existing datasets to the checksums that were written with them; a run looks "
        "at their sizes and types",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the lengths of documents into a .png, .svg or .pdf file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


class _DescribeAction(argparse.Action):
    """Takes the place of all that is needed to write a dataset."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            action.required = False


def preprocess_data(arguments: list[str] | None = None) -> None:
    """spikingbrain-preprocess."""
    parsed = vars(preprocess_parser().parse_args(arguments))
    # Slurm ends a job with SIGTERM: leave as after Ctrl-C, which keeps what is done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with user_errors():
        try:
            _preprocess(parsed)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on", file=sys.stderr)
            raise


def _preprocess(parsed: dict[str, Any]) -> None:
    dry_run, described, plot, as_json = (parsed.pop(name) for name in ("dry_run", "describe", "plot", "json"))
    if verified := parsed.pop("verify"):
        _refuse_writing("--verify", parsed)
        for prefix in verified:
            print(verify_dataset(prefix), flush=True)
        return
    if plot is not None:
        format_of(plot, "--plot")
    if described:
        _describe(described, parsed, plot, as_json)
        return
    options = PreprocessOptions(**parsed)
    if dry_run:
        if plot is not None or as_json:
            raise ConfigurationError(
                "--plot and --json show what was written, but --dry-run writes nothing: leave one out"
            )
        print(plan_preprocessing(options).describe())
        return
    report = preprocess(options, progress=True)
    _draw(report.descriptions, plot)
    print(json.dumps(report.as_values(), indent=2) if as_json else report.describe())


def _refuse_writing(reading: str, others: dict[str, Any]) -> None:
    """Beside a flag that reads datasets stands none that writes one. Raises ConfigurationError."""
    writing = {"inputs": "--input", "output_prefix": "--output-prefix", "tokenizer": "--tokenizer"}
    for name, flag in writing.items():
        if others[name] is not None:
            raise ConfigurationError(
                f"{reading} reads datasets that exist and {flag} is for writing one: leave one of them out"
            )


def _describe(prefixes: list[str], others: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    seq_length = others["seq_length"]
    _refuse_writing("--describe", others)
    check_seq_length(seq_length)
    descriptions = [describe_dataset(prefix, seq_length) for prefix in prefixes]
    packed = [
        ways_to_pack(each.prefix, seq_length)
        for each in descriptions
        if seq_length is not None and not has_loss_mask(each.prefix)
    ]
    _draw(descriptions, plot, seq_length)
    if as_json:
        values = {"datasets": [each.as_values() for each in descriptions]}
        values |= {"packing": [each.as_values() for each in packed]} if packed else {}
        print(json.dumps(values, indent=2))
        return
    answers = answer_table(descriptions, seq_length)
    lines = [*length_table(descriptions), *answers, *text_histogram(descriptions)]
    print("\n".join([*lines, *(line for each in packed for line in each.text())]))


def _draw(descriptions: list[DatasetDescription], plot: Path | None, seq_length: int | None = None) -> None:
    if plot is not None:
        from spikingbrain_train.data.length_picture import save_length_picture

        save_length_picture(descriptions, plot, seq_length)
        print(f"drew {plot}", file=sys.stderr)
