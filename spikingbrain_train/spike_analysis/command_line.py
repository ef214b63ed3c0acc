"""Arguments of spikingbrain-analyze-spikes, understood before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError
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
from spikingbrain_train.spike_analysis.published import PUBLISHED
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
    add_output_folder(parser, NUMBERS_FILE, PAGE_FILE)
    add_text_options(parser)
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
    check_reading(arguments)
    if not 1 <= arguments.window <= 32:
        raise ConfigurationError(f"--window is {arguments.window}; give 1 to 32 steps")
    for flag, values in (("--k", [arguments.k]), ("--sweep", arguments.sweep)):
        for k in values:
            if k is not None and not 0 < k < 1e4:
                raise ConfigurationError(f"{flag} has {k:g}; give k above 0 and below 10000")
    arguments.energy = EnergyModel(
        arguments.energy_fp16_mac, arguments.energy_int8_mac, arguments.energy_int8_add
    )
    return reading_of(arguments, _analyze_folder, _analyze_checkpoint)


def _analyze_folder(arguments: argparse.Namespace) -> None:
    model, tokenizer = open_folder(arguments)
    from spikingbrain_train.spike_analysis.hugging_face import HuggingFaceSpikes
    from spikingbrain_train.spike_analysis.run import run

    run(
        HuggingFaceSpikes(model, tokenizer, str(arguments.model)),
        arguments,
        form=f"Hugging Face, {type(model).__name__}",
        dtype=str(model.dtype).removeprefix("torch."),
        json=NUMBERS_FILE,
        page=PAGE_FILE,
    )


def _analyze_checkpoint(request: CheckpointRequest, tokenizer: Path, arguments: argparse.Namespace) -> None:
    with ranks_for_reading(request, arguments, "whose spikes would count") as groups:
        from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
        from spikingbrain_train.spike_analysis.megatron import MegatronSpikes
        from spikingbrain_train.spike_analysis.run import run

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
