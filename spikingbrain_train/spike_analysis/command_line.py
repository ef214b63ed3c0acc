"""Arguments of spikingbrain-analyze-spikes, understood before torch is imported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.checkpoint_request import (
    CheckpointRequest,
    for_reading,
    request_checkpoint,
)
from spikingbrain_train.evaluation.inference_command_line import (
    Elsewhere,
    check_model_files,
    inference_parser,
    run_inference,
)
from spikingbrain_train.planning.file_checks import check_output_folder, check_prefix
from spikingbrain_train.planning.parallel_checks import check_sequence_split
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.spike_analysis.published import PUBLISHED
from spikingbrain_train.spike_analysis.window_checks import check_windows
from spikingbrain_train.spiking.energy import EnergyModel

NUMBERS_FILE, PAGE_FILE = "spikes.json", "spikes.html"
"""What lies in --output."""

_DESCRIPTION = """\
Count the spikes that a checkpoint's projections send on text: how often each count occurs, sparsity and mean
spikes in every coding, energy of a multiply-accumulate, per layer and projection and overall, and what cross
entropy costs at every k. Any model will do: one trained with spikes is counted where it has them, any other
as if all of its projections but the output head read spikes.
"""

_EXAMPLES = """\
examples:
  # a dense model or an export, on the first tokens of a text; tables on the terminal
  spikingbrain-analyze-spikes --model models/SmolLM2-135M-Instruct --text docs.jsonl

  # the newest checkpoint of a run, with spikes.json and spikes.html in a folder
  spikingbrain-analyze-spikes --model outputs/smollm2/cpt --data outputs/smollm2/data/text_valid \\
      --output outputs/spikes

  # one k only, sparsity of four steps, energies of another process
  spikingbrain-analyze-spikes --model outputs/smollm2/cpt --text docs.jsonl --k 2 --sweep --window 4 \\
      --energy-int8-add 0.007 --energy-int8-mac 0.06 --energy-fp16-mac 0.34

  # a checkpoint too big for one device
  spikingbrain-analyze-spikes --nproc-per-node 4 --model outputs/big --text docs.jsonl --parallel tp2_pp2

In --output: spikes.json (every number, all histograms) and spikes.html (one file that needs no other).
"""


def analyze_spikes_parser() -> argparse.ArgumentParser:
    """The flags of spikingbrain-analyze-spikes."""
    parser = inference_parser(_DESCRIPTION, _EXAMPLES, output_file=False)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for {NUMBERS_FILE} and {PAGE_FILE} (default: tables only)",
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text to read: files (.txt, .jsonl, compressed or not), folders, globs, or pydoc-topics",
    )
    text.add_argument(
        "--data", nargs="+", metavar="PREFIX", help="or held-out indexed datasets, without .bin/.idx"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="field of a JSON document (default: %(default)s)"
    )
    parser.add_argument(
        "--windows", type=int, default=4, metavar="N", help="windows to read (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-length", type=int, default=512, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--k",
        type=float,
        metavar="K",
        help="spikes of an average channel (default: as the checkpoint was trained, else 3)",
    )
    parser.add_argument(
        "--sweep",
        type=float,
        nargs="*",
        default=list(PUBLISHED),
        metavar="K",
        help="further k to read the text with (default: 2 2.5 3 3.5 4, the paper's table 11); without "
        "numbers none",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=3,
        metavar="N",
        help="steps that sparsities are of (default: %(default)s)",
    )
    energies = parser.add_argument_group("energies of single operations, in pJ; the defaults are for 45 nm")
    energies.add_argument(
        "--energy-fp16-mac",
        type=float,
        default=EnergyModel.fp16_mac,
        metavar="PJ",
        help="multiply-accumulate in FP16 (default: %(default)s)",
    )
    energies.add_argument(
        "--energy-int8-mac",
        type=float,
        default=EnergyModel.int8_mac,
        metavar="PJ",
        help="multiply-accumulate in INT8 (default: %(default)s)",
    )
    energies.add_argument(
        "--energy-int8-add",
        type=float,
        default=EnergyModel.int8_add,
        metavar="PJ",
        help="the INT8 addition that a spike is (default: %(default)s)",
    )
    return parser


def analyze_spikes(arguments: Sequence[str] | None = None, *, elsewhere: Elsewhere | None = None) -> None:
    """spikingbrain-analyze-spikes."""
    run_inference(analyze_spikes_parser(), _prepare, arguments, elsewhere)


def _prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    check_windows(arguments.windows, arguments.seq_length)
    if not 1 <= arguments.window <= 32:
        raise ConfigurationError(f"--window is {arguments.window}; give 1 to 32 steps")
    for flag, values in (("--k", [arguments.k]), ("--sweep", arguments.sweep)):
        for k in values:
            if k is not None and not 0 < k < 1e4:
                raise ConfigurationError(f"{flag} has {k:g}; give k above 0 and below 10000")
    arguments.energy = EnergyModel(
        arguments.energy_fp16_mac, arguments.energy_int8_mac, arguments.energy_int8_add
    )
    if arguments.output is not None:
        check_output_folder(arguments.output, "--output")
    is_checkpoint = check_model_files(arguments)
    for prefix in arguments.data or ():
        check_prefix("--data", prefix)
    if not is_checkpoint:
        return partial(_analyze_folder, arguments)
    request = request_checkpoint(
        arguments.model,
        settings=arguments.parallel,
        device=arguments.device,
        dtype=arguments.dtype,
        world_size=arguments.world_size,
    )
    try:
        check_sequence_split(arguments.seq_length, request.model, request.parallel)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("stage.seq_length=", "--seq-length ")) from None
    tokenizer = arguments.tokenizer or request.tokenizer
    if tokenizer is None:
        raise DataError(
            f"{request.checkpoint} carries no tokenizer; name the one that its data were made with: "
            "--tokenizer FOLDER"
        )
    return partial(_analyze_checkpoint, for_reading(request), Path(tokenizer), arguments)


def _analyze_folder(arguments: argparse.Namespace) -> None:
    from spikingbrain_train.evaluation.folder_model import load_folder

    model = load_folder(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    ignore_megatron_warnings()  # before megatron-core, which comes with the datasets
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
    from spikingbrain_train.spike_analysis.hugging_face import HuggingFaceSpikes
    from spikingbrain_train.spike_analysis.run import run

    tokenizer = TextTokenizer(arguments.tokenizer or arguments.model)
    run(
        HuggingFaceSpikes(model, tokenizer, str(arguments.model)),
        arguments,
        form=f"Hugging Face, {type(model).__name__}",
        dtype=str(model.dtype).removeprefix("torch."),
        json=NUMBERS_FILE,
        page=PAGE_FILE,
    )


def _analyze_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    from spikingbrain_train.runtime.quiet_torch import ignore_megatron_warnings

    with activity("importing torch and megatron-core", shown=os.environ.get("RANK", "0") == "0"):
        ignore_megatron_warnings()
        import megatron.core.models.gpt  # noqa: F401  (the slow part)

        from spikingbrain_train.evaluation.checkpoint_model import joined_ranks
        from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
        from spikingbrain_train.spike_analysis.megatron import MegatronSpikes
        from spikingbrain_train.spike_analysis.run import run

    with joined_ranks(request) as groups:
        if arguments.windows % groups.data_parallel_size:
            raise ConfigurationError(
                f"--windows {arguments.windows} cannot be split over {groups.data_parallel_size} "
                "data-parallel ranks without padding, whose spikes would count; give a multiple"
            )
        model = MegatronSpikes(request, groups, TextTokenizer(tokenizer), arguments.seq_length)
        ranks = "" if groups.world_size == 1 else f"; {groups.describe()}"
        run(
            model,
            arguments,
            form=f"Megatron{ranks}",
            dtype=model.opened.dtype,
            json=NUMBERS_FILE,
            page=PAGE_FILE,
        )
