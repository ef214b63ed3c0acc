"""Claim: a hybrid within 0.40 nats of its dense source after 250k tokens, 0.25 after 1M, on text that no
stage has seen; at least 20 x fewer tokens than plain continual pretraining to come within 0.5.

SmolLM2-135M, half of its layers gated linear attention, the others windows of 512; sequences of 2048. Methods
(benchmarks/conversion_methods.py) side by side at equal tokens, several seeds. All of it is commands that
users type; it is resumable, and runs in pieces:

  python benchmarks/conversion_quality.py --output outputs/quality --model models/SmolLM2-135M-Instruct \\
      --train docs_train.jsonl.zst --valid docs_valid.jsonl.zst --tokens 250k 1M --seeds 1 2 3 --minutes 60

With --device cuda --tokens 100M the same on a GPU; with --report a table, a picture and one JSON file of what
is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conversion_methods import METHODS  # noqa: E402
from benchmarks.conversion_report import draw, results_table  # noqa: E402
from benchmarks.conversion_runs import EVALUATIONS, HELD_OUT_CHARACTERS, Bench  # noqa: E402
from benchmarks.project_commands import OutOfTimeError, add_piece_options  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.storage.durable_files import write_text_durably  # noqa: E402

_UNITS = {"k": 10**3, "M": 10**6}


def tokens(text: str) -> int:
    """250k, 1M or a plain number."""
    unit = _UNITS.get(text[-1:], 1)
    return round(float(text.removesuffix(text[-1:]) if unit > 1 else text) * unit)


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder of all runs")
    flags.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the dense source")
    flags.add_argument("--train", type=Path, required=True, help="text to train on")
    flags.add_argument("--valid", type=Path, required=True, help="held-out text of the same kinds")
    flags.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    flags.add_argument(
        "--tokens", nargs="+", type=tokens, default=[250_000], help="of all stages, e.g. 250k 1M"
    )
    flags.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    flags.add_argument(
        "--held-out", type=int, default=HELD_OUT_CHARACTERS, help="characters of each text to measure on"
    )
    flags.add_argument(
        "--evaluations", type=int, default=EVALUATIONS, help=f"of a stage (default {EVALUATIONS})"
    )
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_piece_options(flags)
    return flags


def finished(output: Path) -> list[dict[str, Any]]:
    """Results of all runs so far."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("runs/*/result.json"))]


def main() -> None:
    """Run what is missing, then show what is there."""
    flags = parser().parse_args()
    deadline = None if flags.minutes is None else time.monotonic() + 60 * flags.minutes
    bench = Bench(
        flags.output,
        flags.model,
        flags.train,
        flags.valid,
        flags.device,
        deadline,
        held_out_characters=flags.held_out,
        evaluations=flags.evaluations,
    )
    with user_errors():
        if not flags.report:
            try:
                methods = [METHODS[name] for name in flags.methods]
                bench.prepare({method.conversion for method in methods})
                for budget in flags.tokens:
                    for seed in flags.seeds:
                        for method in methods:
                            bench.run(method, budget, seed)
            except OutOfTimeError as stop:
                print(stop)
        results = finished(flags.output)
        if results:
            print("\n".join(results_table(results, bench.dense())))
            draw(results, bench.dense(), flags.output / "conversion_quality.png")
            numbers = json.dumps({"dense": bench.dense(), "runs": results}, indent=1)
            write_text_durably(flags.output / "conversion_quality.json", numbers + "\n")


if __name__ == "__main__":
    main()
