"""Claim: parts of a model can be told apart, left out and trained alone (arXiv 2409.02877, 2110.01786).

Pieces, on SmolLM2-135M-Instruct and real text of eight kinds: cross entropy without the weakest neurons of
every token; abilities without the neurons of each; feed-forwards cut into experts, before and after some
training; predictors of activity on a model with ReLU; adapters trained, merged and composed. All of it is
commands that users type; it is resumable, and runs in pieces:

  python benchmarks/bricks.py --output outputs/bricks --model models/SmolLM2-135M-Instruct \\
      --train docs_train.jsonl.zst --valid docs_valid.jsonl.zst --relu outputs/relu/cpt --minutes 60

With --report tables and one JSON file of what is there. Texts come from Debian packages, which apt-get
fetches (benchmarks/bricks_texts.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bricks_report import report  # noqa: E402
from benchmarks.bricks_runs import BrickRuns, Sizes, found  # noqa: E402
from benchmarks.project_commands import (  # noqa: E402
    OutOfTimeError,
    ProjectCommands,
    add_piece_options,
)
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.storage.durable_files import write_text_durably  # noqa: E402

PIECES = ("neurons", "abilities", "moefication", "predictors", "adapters")


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = Sizes()
    flags.add_argument("--output", type=Path, required=True, help="folder of all pieces")
    flags.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the dense source")
    flags.add_argument("--train", type=Path, required=True, help="text to train on, JSON lines")
    flags.add_argument("--valid", type=Path, required=True, help="held-out text of the same kinds")
    flags.add_argument(
        "--relu", type=Path, help="checkpoint with ReLU, of benchmarks/prosparse.py for example"
    )
    flags.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    flags.add_argument("--steps", type=int, default=sizes.steps, help="of 512 tokens, of every training")
    flags.add_argument("--windows", type=int, default=sizes.windows, help="of 512 tokens, for a number")
    flags.add_argument(
        "--ability-windows", type=int, default=sizes.ability_windows, help="of 128 tokens of each ability"
    )
    flags.add_argument(
        "--predictor-windows", type=int, default=sizes.predictor_windows, help="that predictors learn from"
    )
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to read in")
    add_piece_options(flags)
    return flags


def main() -> None:
    """Run what is missing, then show what is there."""
    flags = parser().parse_args()
    sizes = Sizes(flags.windows, flags.ability_windows, flags.predictor_windows, flags.steps)
    commands = ProjectCommands.within(flags.minutes)
    runs = BrickRuns(flags.output, flags.model, flags.relu, commands, sizes, flags.dtype)
    with user_errors():
        if not flags.report:
            try:
                runs.prepare(flags.train, flags.valid)
                for piece in flags.pieces:
                    getattr(runs, piece)()
            except OutOfTimeError as stop:
                print(stop)
        pieces = found(flags.output)
        print("\n".join(report(pieces)))
        write_text_durably(flags.output / "bricks.json", json.dumps(pieces, indent=1) + "\n")


if __name__ == "__main__":
    main()
