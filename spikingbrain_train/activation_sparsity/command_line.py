"""Arguments of spikingbrain-analyze-sparsity, understood before torch is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from spikingbrain_train.activation_sparsity.result_files import NUMBERS_FILE, PICTURE_FILE
from spikingbrain_train.activation_sparsity.zero_checks import nothing_is_zero
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest
from spikingbrain_train.evaluation.inference_command_line import Elsewhere, inference_parser, run_inference
from spikingbrain_train.evaluation.reading_command_line import (
    add_output_folder,
    add_text_options,
    check_reading,
    open_folder,
    ranks_for_reading,
    reading_of,
)

_THRESHOLDS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
_LOSS_BUDGET = 0.01

_DESCRIPTION = """\
Count what is zero inside the feed-forwards of a model whose gates go through relu or fatrelu (ProSparse), on
text: share of zeros, active channels of a token, channels that are never or always active, per layer and
overall; and what thresholds of the gates make of sparsity and cross entropy. --fit-threshold chooses the
largest threshold that stays within a loss budget.
"""

_EXAMPLES = """\
examples:
  # the newest checkpoint of a run, with sparsity.json and sparsity.png in a folder
  spikingbrain-analyze-sparsity --model outputs/relu/cpt --text docs.jsonl --output outputs/sparsity

  # thresholds of one's own, on an export
  spikingbrain-analyze-sparsity --model exports/relu --text docs.jsonl --thresholds 0 0.01 0.03

  # the largest threshold that costs at most 0.02 nats, and the commands that write a folder with it
  spikingbrain-analyze-sparsity --model outputs/relu/cpt --text docs.jsonl --fit-threshold --loss-budget 0.02

In --output: sparsity.json (every number) and sparsity.png.
"""


def analyze_sparsity_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-analyze-sparsity."""
    parser = inference_parser(_DESCRIPTION, _EXAMPLES, output_file=False)
    add_output_folder(parser, NUMBERS_FILE, PICTURE_FILE)
    add_text_options(parser)
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        default=list(_THRESHOLDS),
        metavar="T",
        help="thresholds to read the text with, from the smallest on; 0 is ReLU (default: "
        f"{' '.join(f'{each:g}' for each in _THRESHOLDS)}; without numbers none but the model's own)",
    )
    parser.add_argument(
        "--fit-threshold",
        action="store_true",
        help="find the largest threshold whose cross entropy stays within --loss-budget",
    )
    parser.add_argument(
        "--loss-budget",
        type=float,
        metavar="NATS",
        help="that a fitted threshold may cost above the model as it is, nats per token (default: "
        f"{_LOSS_BUDGET})",
    )
    return parser


def analyze_sparsity(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-analyze-sparsity."""
    run_inference(analyze_sparsity_parser(), _prepare, arguments, elsewhere)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    check_reading(arguments)
    check_thresholds(arguments)
    return reading_of(arguments, _analyze_folder, _analyze_checkpoint)


def check_thresholds(arguments: argparse.Namespace) -> None:
    """Refuse thresholds and budgets that do not fit; a budget that nobody gave becomes the usual one.

    Raises:
        ConfigurationError: naming the flag.
    """
    thresholds = arguments.thresholds
    for each in thresholds:
        if not 0 <= each < math.inf:
            raise ConfigurationError(f"--thresholds has {each:g}; a gate's threshold is at least 0 (ReLU)")
    if any(a >= b for a, b in zip(thresholds, thresholds[1:], strict=False)):
        ordered = " ".join(f"{each:g}" for each in sorted(set(thresholds)))
        raise ConfigurationError(f"--thresholds are to rise; give --thresholds {ordered}")
    if arguments.loss_budget is not None and not arguments.fit_threshold:
        raise ConfigurationError("--loss-budget is read with --fit-threshold only; add that, or leave it out")
    if arguments.loss_budget is None:
        arguments.loss_budget = _LOSS_BUDGET
    if not 0 <= arguments.loss_budget < math.inf:
        raise ConfigurationError(
            f"--loss-budget is {arguments.loss_budget:g}; give nats per token of at least 0"
        )


def _analyze_folder(arguments: argparse.Namespace) -> None:
    model, tokenizer = open_folder(arguments)
    from spikingbrain_train.activation_sparsity.hugging_face import HuggingFaceGates
    from spikingbrain_train.activation_sparsity.run import run

    run(
        HuggingFaceGates(model, tokenizer, str(arguments.model)),
        arguments,
        form=f"Hugging Face, {type(model).__name__}",
        is_checkpoint=False,
        dtype=str(model.dtype).removeprefix("torch."),
        json=NUMBERS_FILE,
        picture=PICTURE_FILE,
    )


def _analyze_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    activation = request.model.activation_func
    if activation not in (ActivationFunc.relu, ActivationFunc.fatrelu):
        raise CheckpointError(nothing_is_zero(str(request.checkpoint), activation.value))
    with ranks_for_reading(request, arguments, "which would count") as groups:
        from spikingbrain_train.activation_sparsity.megatron import MegatronGates
        from spikingbrain_train.activation_sparsity.run import run
        from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

        model = MegatronGates(request, groups, TextTokenizer(tokenizer), arguments.seq_length)
        ranks = "" if groups.world_size == 1 else f"; {groups.describe()}"
        run(
            model,
            arguments,
            form=f"Megatron{ranks}",
            is_checkpoint=True,
            dtype=model.opened.dtype,
            json=NUMBERS_FILE,
            picture=PICTURE_FILE,
        )
